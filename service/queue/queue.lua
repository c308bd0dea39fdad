-- Every atomic step of the queue. service/queue/scripts.py makes a script of each command: the constants, the lines up to
-- the first function, what the command needs of this file and of those beside it, and dispatch.lua. Each function, and
-- each constant after the first function, begins at the left margin; nothing else does.
--
-- A job is a hash with a status. WAITING lists exactly the jobs whose status is waiting. An entry of a queue stream is
-- pending in the consumer group exactly while its job runs. Each command keeps these three consistent and uses Redis's
-- clock. Replies are {result, jobs that ended as a side effect}.

local call = redis.call
local time = call('TIME')
local now = string.format('%d.%06d', time[1], time[2])
local ended = {}
local news = {} -- what NEWS tells: ids of jobs with new events; FLEET_NEWS
local commands = {}

local function record(id)
  return call('HGETALL', JOB .. id)
end

local function fields(id, ...)
  return unpack(call('HMGET', JOB .. id, ...))
end

-- Adds an event. Its watchers hear of it, unless it is `unheard`: then nobody waits for more than the job's end.
local function emit(id, event, unheard)
  news[id] = news[id] or not unheard or nil
  return call('XADD', EVENTS .. id, '*', 'event', event)
end

-- The index of the picture that an event previews, or nil for other events. Fields of messages have a fixed order.
local function previewed(event)
  return string.match(event, '^{"type":"preview","index":(%d+),')
end

-- Deletes a job's oldest previews, but not its newest event, until its events are at most EVENTS_KEPT and all previews
-- together at most PREVIEWS_BYTES. Other events are few, and no watcher may miss them.
local function shed_previews(id, newest)
  local stream, from, bytes = EVENTS .. id, fields(id, 'shed', 'preview_bytes')
  local excess = call('XLEN', stream) - EVENTS_KEPT
  bytes, from = tonumber(bytes or 0), from or '-'
  while excess > 0 or bytes > PREVIEWS_BYTES do
    local oldest = call('XRANGE', stream, from, '+', 'COUNT', 1)[1]
    if oldest[1] == newest then
      break
    elseif previewed(oldest[2][2]) then
      call('XDEL', stream, oldest[1])
      excess = excess - 1
      bytes = call('HINCRBY', JOB .. id, 'preview_bytes', -#oldest[2][2])
    end
    from = '(' .. oldest[1]
    call('HSET', JOB .. id, 'shed', from)
  end
end

local function without_stale_previews(entries)
  local seen, kept = {}, {}
  for index = #entries, 1, -1 do
    local picture = previewed(entries[index][2][2])
    if not picture or not seen[picture] then
      table.insert(kept, 1, entries[index])
    end
    seen[picture or ''] = true
  end
  return kept
end

-- Tells whether a stream holds jobs that not every worker can run.
local function special(stream)
  return string.find(stream or '', QUEUE .. SPECIAL, 1, true) == 1
end

-- Tells whether a worker with the special capabilities `can` may run a job with the special needs `needs`; both are
-- words separated by spaces.
local function able(can, needs)
  for word in string.gmatch(needs or '', '%S+') do
    if not string.find(' ' .. can .. ' ', ' ' .. word .. ' ', 1, true) then
      return false
    end
  end
  return true
end

-- Wakes one of the clients that wait at this bell. If none waits, the next one that comes does not have to. Bells are
-- only hints: whoever waits also looks every second. So few of them need to be kept, and not for long.
local function ring(bell)
  if call('RPUSH', bell, 1) > RINGS then
    call('LPOP', bell)
  end
  call('PEXPIRE', bell, BELL_MS)
end

-- `...` are more fields of the job's record, and their values.
local function enqueue(id, model, needs, class, deadline, ...)
  local stream = QUEUE .. (needs and SPECIAL or '') .. class .. ':' .. model
  local entry = call('XADD', stream, '*', 'job', id)
  call('SADD', STREAMS, stream)
  call('HSET', JOB .. id, 'status', 'waiting', 'stream', stream, 'entry', entry, ...)
  call('ZADD', WAITING, deadline, id .. ':' .. model)
  local pin = needs and string.match(needs, 'digest%.%x+') -- other workers of the model would only silence its bell
  ring(BELL .. (needs and SPECIAL or '') .. (pin and pin .. ':' or '') .. model)
end

-- Use only for delivered entries: deleting others would make the group's lag unknown.
local function drop(stream, entry)
  redis.pcall('XACK', stream, GROUP, entry) -- fails if the group was lost; then there is nothing to acknowledge
  call('XDEL', stream, entry)
end

-- Resets an entry's idle time and nothing else. If the group was lost, `claim` creates it again.
local function heard(stream, entry)
  redis.pcall('XCLAIM', stream, GROUP, CONSUMER, 0, entry, 'JUSTID')
end

local function start(id, stream, entry, worker, token)
  local model, attempt, started_at = fields(id, 'model', 'attempt', 'started_at')
  attempt = string.format('%d', (attempt or 0) + 1)
  call('ZREM', WAITING, id .. ':' .. (model or ''))
  call('HSET', JOB .. id, 'status', 'running', 'attempt', attempt, 'owner', worker, 'stream', stream, 'entry', entry,
    'claimed_at', now, 'started_at', started_at or now)
  call('HSET', TAKEN .. worker, 'token', token, 'job', id, 'attempt', attempt)
  call('EXPIRE', TAKEN .. worker, RESULT_TTL)
  return record(id)
end

-- The job that an earlier call with this token started; nil if there is none, or it is not running any more. A worker
-- that got no answer calls again with the same token. Otherwise the job would run nowhere until its claim was idle.
local function started_before(worker, token)
  local its_token, id, its_attempt = unpack(call('HMGET', TAKEN .. worker, 'token', 'job', 'attempt'))
  if its_token == token then
    local status, owner, attempt, stream, entry = fields(id, 'status', 'owner', 'attempt', 'stream', 'entry')
    if status == 'running' and owner == worker and attempt == its_attempt then
      heard(stream, entry)
      return record(id)
    end
  end
end

-- The only way to end a job. The entry of a job that never ran stays in its stream until a claim finds it. In a special
-- stream it is deleted at once, because perhaps no worker reads that stream any more.
local function finish(id, status, event, ...)
  local was, stream, entry, model, keep, tenant = fields(id, 'status', 'stream', 'entry', 'model', 'keep', 'tenant')
  if was == 'running' or special(stream) then
    drop(stream, entry)
  end
  if was == 'waiting' then
    call('ZREM', WAITING, id .. ':' .. (model or ''))
  end
  call('HSET', JOB .. id, 'status', status, 'finished_at', now, 'last_event', emit(id, event), ...)
  for _, key in ipairs({ JOB .. id, EVENTS .. id, IMAGES .. id, SOURCES .. id }) do
    call('EXPIRE', key, keep or RESULT_TTL)
  end
  call('SREM', IN_FLIGHT .. (tenant or ''), id)
  unreserve(JOB .. id)
end

local function finish_as_side_effect(id, ...)
  finish(id, ...)
  table.insert(ended, record(id))
end

local function expire_overdue()
  for _, overdue in ipairs(call('ZRANGE', WAITING, '-inf', now, 'BYSCORE')) do
    local id = string.match(overdue, '^[^:]+')
    if fields(id, 'status') == 'waiting' then
      finish_as_side_effect(id, 'expired', EXPIRED)
    else -- someone deleted it by hand; this must not raise, because every command comes here
      call('ZREM', WAITING, overdue)
    end
  end
end

-- Tells whether a claim is still valid: its worker, attempt, stream and entry must all be those of the running job. The
-- second result is the job's `quiet`.
-- Entry and attempt distinguish two starts of a job, the stream distinguishes entries made in the same millisecond, and
-- the worker distinguishes two claims with equal numbers, which a fail-over to a lagging replica can create.
local function owned(id, worker, attempt, stream, entry)
  local status, its_worker, its_attempt, its_stream, its_entry, quiet =
    fields(id, 'status', 'owner', 'attempt', 'stream', 'entry', 'quiet')
  return status == 'running' and its_worker == worker and its_attempt == attempt and its_stream == stream
    and its_entry == entry, quiet
end

-- Delivers up to `count` entries of a stream that no worker has been given; nil if there are none.
local function deliver(stream, count)
  local read = { 'XREADGROUP', 'GROUP', GROUP, CONSUMER, 'COUNT', count, 'STREAMS', stream, '>' }
  local reply = redis.pcall(unpack(read))
  if reply and reply.err then -- no such group: the stream is new, or was flushed
    redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
    reply = call(unpack(read))
  end
  return reply and reply[1][2]
end

-- The next entry of a stream that no worker has been given, and its job; nil if there is none.
local function read_new(stream)
  local entries = deliver(stream, 1)
  if entries then
    local entry = entries[1]
    return entry[1], entry[2][2]
  end
end

-- The first entry of a special stream whose job is waiting and needs only `can`, and that job; nil if there is none.
-- A group delivers entries in order, but a worker must not block entries for other workers. So the first look delivers
-- all entries, and they stay pending while their jobs wait.
local function read_special(stream, can)
  deliver(stream, SKIPS)
  for _, entry in ipairs(call('XRANGE', stream, '-', '+', 'COUNT', SKIPS)) do
    local id = entry[2][2]
    local status, current, needs = fields(id, 'status', 'entry', 'needs')
    if current ~= entry[1] or (status ~= 'waiting' and status ~= 'running') then -- deleted by hand
      drop(stream, entry[1])
    elseif status == 'waiting' and able(can, needs) then
      heard(stream, entry[1])
      return entry[1], id
    end
  end
end

-- Tells whether a tenant with a limit of `most` jobs, 0 = none, may have another. Jobs that someone deleted by hand are
-- removed from the count.
local function may_start(tenant, most)
  local key = IN_FLIGHT .. tenant
  if most == 0 or call('SCARD', key) < most then
    return true
  end
  for _, id in ipairs(call('SMEMBERS', key)) do
    if call('EXISTS', JOB .. id) == 0 then
      call('SREM', key, id)
    end
  end
  return call('SCARD', key) < most
end

-- Takes `pictures` from a tenant's bucket, which gains RATE_LIMIT per minute, up to RATE_BURST. A request for more than
-- RATE_BURST leaves a debt. `reserve` pictures stay in the bucket. Returns 0, or the seconds to wait if it has too few.
local function seconds_to_wait(tenant, pictures, reserve)
  if RATE_LIMIT == 0 then
    return 0
  end
  local key, a_second = RATE .. tenant, RATE_LIMIT / 60
  local left, at = unpack(call('HMGET', key, 'left', 'at'))
  left = math.min(RATE_BURST, (left or RATE_BURST) + math.max(0, now - (at or now)) * a_second)
  local needed = math.min(pictures + reserve, RATE_BURST)
  if left < needed then
    return math.ceil((needed - left) / a_second)
  end
  left = left - pictures
  call('HSET', key, 'left', left, 'at', now)
  call('EXPIRE', key, math.ceil((RATE_BURST - left) / a_second))
  return 0
end

-- What a submit may use of each limit: everything, or for batches half, so that other callers always find room. The
-- limit for memory is a share of the server's, which needs some for itself.
local WHOLE = { waiting = MAX_WAITING, in_flight = MAX_IN_FLIGHT, reserve = 0, memory = 0.9 }
local HALF = {
  waiting = math.ceil(MAX_WAITING / 2), in_flight = math.ceil(MAX_IN_FLIGHT / 2), reserve = math.floor(RATE_BURST / 2),
  memory = 0.75
}

-- The caller waits for replicas to have what it wrote. So this writes something: replicas that have it have the job too.
local function accepted_before(id)
  call('HSET', JOB .. id, 'status', fields(id, 'status'))
  return { 'ok', record(id) }
end

local function submit(limits, id, model, priority, request, deadline_seconds, idempotency_key, fingerprint, tenant,
                      pictures, trace, protocol, needs, room, degradable, quiet, ...)
  if idempotency_key ~= '' then
    local first, its_fingerprint = unpack(call('HMGET', idempotency_key, 'job', 'fingerprint'))
    if first and its_fingerprint ~= fingerprint then
      return { 'conflict' }
    end
    if first and call('EXISTS', JOB .. first) == 1 then
      return accepted_before(first)
    end
  end
  if call('EXISTS', JOB .. id) == 1 then
    return accepted_before(id)
  end
  if call('ZCARD', WAITING) >= limits.waiting then
    return { 'full' }
  end
  if not may_start(tenant, limits.in_flight) then
    return { 'busy' }
  end
  local refused = refuse_without_room(tonumber(room), limits.memory)
  if refused then
    return refused
  end
  local wait = seconds_to_wait(tenant, tonumber(pictures), limits.reserve)
  if wait > 0 then
    return { 'limited', wait }
  end
  reserve(JOB .. id, tonumber(room), REVIEW_SECONDS)
  local record_of_job = { 'id', id, 'model', model, 'request', request, 'created_at', now, 'attempt', 0, 'protocol',
    protocol }
  local given = { needs = needs, degradable = degradable, quiet = quiet, tenant = tenant, trace = trace }
  for name, value in pairs(given) do
    if value ~= '' then
      table.insert(record_of_job, name)
      table.insert(record_of_job, value)
    end
  end
  if MAX_IN_FLIGHT > 0 then
    call('SADD', IN_FLIGHT .. tenant, id)
  end
  if ... then
    call('HSET', SOURCES .. id, ...)
  end
  local deadline = deadline_seconds == '' and '+inf' or now + deadline_seconds
  enqueue(id, model, needs ~= '' and needs, priority, deadline, unpack(record_of_job))
  emit(id, QUEUED, true) -- nobody can watch a job that was not there
  if idempotency_key ~= '' then
    call('HSET', idempotency_key, 'job', id, 'fingerprint', fingerprint)
    call('EXPIRE', idempotency_key, IDEMPOTENCY_TTL)
  end
  return { 'ok', record(id) }
end

function commands.submit(...)
  return submit(WHOLE, ...)
end

function commands.read(id)
  return record(id)
end

-- Events after an id, and whether there may be more. A watcher that has more to read than these limits has fallen
-- behind, and gets only the newest preview of each picture.
function commands.news(id, after, count, bytes)
  local status, last_event, quiet = fields(id, 'status', 'last_event', 'quiet')
  if quiet then
    call('HDEL', JOB .. id, 'quiet')
  end
  local entries, size = call('XRANGE', EVENTS .. id, '(' .. after, '+', 'COUNT', count), 0
  for _, entry in ipairs(entries) do
    size = size + #entry[2][2]
  end
  local more = #entries == tonumber(count) and 1 or 0
  if more == 1 or size > tonumber(bytes) then
    entries = without_stale_previews(entries)
  end
  return { status, last_event, entries, more }
end

-- {model, number of its waiting jobs, those among them that are not of batches, seconds that the oldest of these has
-- waited} for each model that has any: nobody waits for batches. Ids sort by creation time.
local function lines()
  local first, jobs, hurried, found = {}, {}, {}, {}
  for _, waiting in ipairs(call('ZRANGE', WAITING, 0, -1)) do
    local id, model = string.match(waiting, '^([^:]+):(.*)$')
    jobs[model] = (jobs[model] or 0) + 1
    if call('SISMEMBER', BATCH_JOBS, id) == 0 then
      hurried[model] = (hurried[model] or 0) + 1
      first[model] = first[model] and first[model] < id and first[model] or id
    end
  end
  for model, count in pairs(jobs) do
    local created_at = first[model] and tonumber(fields(first[model], 'created_at')) -- missing if deleted by hand
    local age = created_at and string.format('%.6f', now - created_at) or ''
    table.insert(found, { model, count, hurried[model] or 0, age })
  end
  return found
end

function commands.backlog()
  return { call('ZCARD', WORKERS), lines() }
end

function commands.cancel(id)
  local status = fields(id, 'status')
  if status == 'waiting' then
    finish_as_side_effect(id, 'cancelled', CANCELLED)
  elseif status == 'running' then
    call('HSET', JOB .. id, 'cancel', 1)
    ring(CALL .. fields(id, 'owner'))
  end
  return record(id)
end

-- Restarts the job of a silent worker: returns its record, or nothing if these streams have none. Ends such jobs if they
-- are cancelled or out of attempts.
local function take_over(streams, worker, token, can)
  for _, stream in ipairs(streams) do
    local from = '-'
    local function idle()
      local pending = redis.pcall('XPENDING', stream, GROUP, 'IDLE', CLAIM_IDLE_MS, from, '+', 1)
      local entry = not pending.err and pending[1] and pending[1][1] -- an error means that the group does not exist yet
      from = entry and '(' .. entry
      return entry or nil
    end
    for entry in idle do
      local found = call('XRANGE', stream, entry, entry)[1]
      local id = found and found[2][2]
      local status, current, cancel, attempt, owner, needs
      if id then
        status, current, cancel, attempt, owner, needs =
          fields(id, 'status', 'entry', 'cancel', 'attempt', 'owner', 'needs')
      end
      if status == 'waiting' and current == entry and special(stream) then
        heard(stream, entry) -- it waits for a worker that can run it
      elseif status ~= 'running' or current ~= entry then
        drop(stream, entry)
      elseif cancel then
        finish_as_side_effect(id, 'cancelled', CANCELLED)
      elseif tonumber(attempt) >= MAX_ATTEMPTS then
        finish_as_side_effect(id, 'failed', DEAD_LETTER, 'error', DEAD_LETTER_ERROR)
        call('XADD', DEAD_LETTERS, 'MAXLEN', '~', DEAD_LETTERS_KEPT, '*', 'job', id, 'worker', owner,
          'attempts', attempt, 'error', DEAD_LETTER_ERROR, 'request', fields(id, 'request'))
      elseif able(can, needs) then
        call('XCLAIM', stream, GROUP, CONSUMER, 0, entry, 'JUSTID')
        return start(id, stream, entry, worker, token)
      end
    end
  end
end

-- What `take_over` finds, but with one look a second at each stream, whoever looks: a look can take as long as many
-- jobs. In special streams, workers with other capabilities find other jobs, so they look by themselves. The second
-- result tells whether it was this worker's turn to look at any stream.
local function take_over_in_turn(worker, token, can)
  local names, due, looked_now = {}, {}, {}
  for index, stream in ipairs(KEYS) do
    names[index] = special(stream) and stream .. ' ' .. can or stream
  end
  for index, looked in ipairs(call('HMGET', LOOKED, unpack(names))) do
    local ago = now - (looked or 0)
    if ago < 0 or ago >= LOOK_SECONDS then
      due[#due + 1] = KEYS[index]
      looked_now[#looked_now + 1] = names[index]
      looked_now[#looked_now + 1] = now
    end
  end
  local found = #due > 0 and take_over(due, worker, token, can)
  if #due > 0 and not found then -- otherwise there may be more
    call('HSET', LOOKED, unpack(looked_now))
    call('EXPIRE', LOOKED, RESULT_TTL)
  end
  return found, #due > 0
end

-- The first waiting job of a stream, started; or nothing. The second result tells whether there may be more behind
-- entries that were skipped.
local function take_waiting(stream, worker, token, can)
  if special(stream) then
    local entry, id = read_special(stream, can)
    return entry and start(id, stream, entry, worker, token), false
  end
  for _ = 1, SKIPS do
    local entry, id = read_new(stream)
    if not entry then
      return nil, false
    end
    local status, current = fields(id, 'status', 'entry')
    if status == 'waiting' and current == entry then
      return start(id, stream, entry, worker, token), false
    elseif status ~= 'running' then -- it ended before its turn; running jobs appear here again if the group was lost
      drop(stream, entry)
    end
  end
  return nil, true
end

-- KEYS: queue streams, most urgent first. `can`: the worker's special capabilities. `look`: whether to take over jobs of
-- silent workers. The bells are those of the worker's models. Returns {the started job, how}: 'again' if it was taken
-- over, 'last' if no other job waits, else 'new'. Or without a job {nothing, 'more' or 'none'}; with 'more', call again.
function commands.claim(worker, token, can, look, ...)
  local before = started_before(worker, token)
  if before then
    return { before, 'new' }
  end
  local again, looked = nil, true
  if look == '1' then
    again, looked = take_over_in_turn(worker, token, can)
  end
  if again then
    return { again, 'again' }
  elseif not looked and call('ZCARD', WAITING) == 0 then
    -- Most claims of idle workers end here. Whose turn it was goes on, clears stale entries, and makes lost groups again.
    call('DEL', ...)
    return { {}, 'none' }
  end
  local skipped = false
  for _, stream in ipairs(KEYS) do
    local started, more = take_waiting(stream, worker, token, can)
    if started and call('ZCARD', WAITING) == 0 then
      call('DEL', ...) -- nothing waits, so nobody needs to wake for what rang before
      return { started, 'last' }
    elseif started then
      return { started, 'new' }
    end
    skipped = skipped or more
  end
  if skipped then
    return { {}, 'more' }
  end
  call('DEL', ...)
  return { {}, 'none' }
end

-- KEYS as for claim. Returns {the restarted job, 'again'}, or without one {nothing, 'none'}. Looks at once.
function commands.reclaim(worker, token, can)
  local found = started_before(worker, token) or take_over(KEYS, worker, token, can)
  return { found or {}, found and 'again' or 'none' }
end

-- The heartbeats of a worker for the jobs that it holds: for each id, attempt, stream and entry. Returns for each
-- whether the claim is 'ok', 'cancelled' or 'lost'.
function commands.keep(worker, ...)
  local claims, verdicts = { ... }, {}
  for at = 1, #claims, 4 do
    local id, attempt, stream, entry = unpack(claims, at, at + 3)
    local verdict = 'lost'
    if owned(id, worker, attempt, stream, entry) then
      verdict = fields(id, 'cancel') and 'cancelled' or 'ok'
      heard(stream, entry)
    end
    verdicts[#verdicts + 1] = verdict
  end
  return verdicts
end

-- Adds an event. A preview that is larger than all of them together may be is left out.
local function publish(id, worker, attempt, stream, entry, event)
  local valid, quiet = owned(id, worker, attempt, stream, entry)
  if not valid then
    return 0
  end
  local preview = previewed(event)
  if preview and #event > PREVIEWS_BYTES then
    return 1
  elseif preview then
    call('HINCRBY', JOB .. id, 'preview_bytes', #event)
  end
  shed_previews(id, emit(id, event, quiet))
  return 1
end

local function store_image(id, worker, attempt, stream, entry, index, data, event)
  local valid, quiet = owned(id, worker, attempt, stream, entry)
  if not valid then
    return 0
  end
  call('HSET', IMAGES .. id, index, data)
  emit(id, event, quiet)
  return 1
end

local function finish_owned(id, worker, attempt, stream, entry, status, event, ...)
  if not owned(id, worker, attempt, stream, entry) then
    return 0
  end
  finish(id, status, event, ...)
  return 1
end

-- What a worker delivers, in order: events, pictures and ends of jobs. Each begins with the number of its words. Returns
-- for each 1, or 0 if its claim is lost.
function commands.deliver(...)
  local known = { publish = publish, store_image = store_image, finish = finish_owned }
  local words, results, at = { ... }, {}, 1
  while at <= #words do
    local last = at + tonumber(words[at])
    results[#results + 1] = known[words[at + 1]](unpack(words, at + 2, last))
    at = last + 1
  end
  return results
end

function commands.release(id, worker, attempt, stream, entry)
  if not owned(id, worker, attempt, stream, entry) then
    return 0
  end
  local cancel = fields(id, 'cancel')
  if cancel then
    finish_as_side_effect(id, 'cancelled', CANCELLED)
  else
    drop(stream, entry)
    local model, needs = fields(id, 'model', 'needs')
    enqueue(id, model, needs, RETURNED, '+inf', 'attempt', attempt - 1) -- no deadline: the job did start in time
  end
  return 1
end

-- {worker, text under each prefix} for each live worker. Workers without a text under the first prefix are left out.
function commands.announced(...)
  local found = {}
  for _, worker in ipairs(call('ZRANGE', WORKERS, 0, -1)) do
    local row = { worker }
    for index, prefix in ipairs({ ... }) do
      row[index + 1] = call('GET', prefix .. worker) or ''
    end
    if row[2] ~= '' then
      found[#found + 1] = row
    end
  end
  return found
end

-- Notes that what a worker serves has changed. Versions begin at the clock, so that a server which lost them does not
-- repeat any. Gateways also read everything now and then, so that few changes need to be kept.
local function keep_changes()
  call('EXPIRE', FLEET, RESULT_TTL)
  call('EXPIRE', CHANGES, RESULT_TTL)
end

local function changed(worker)
  call('SET', FLEET, string.format('%.0f', now * 1000), 'NX')
  call('ZADD', CHANGES, call('INCR', FLEET), worker)
  call('ZREMRANGEBYRANK', CHANGES, 0, -1 - CHANGES_KEPT)
  keep_changes()
  news[FLEET_NEWS] = true
end

-- {version, {worker, models, announcement} for each worker that changed after version `since`}. Those that are gone have
-- empty texts.
function commands.changes(since)
  local version, rows = call('GET', FLEET), {}
  if version and version ~= since then
    for _, worker in ipairs(call('ZRANGE', CHANGES, '(' .. since, '+inf', 'BYSCORE')) do
      rows[#rows + 1] = { worker, unpack(call('MGET', WORKER_MODELS .. worker, ANNOUNCEMENT .. worker)) }
    end
  end
  return { version, rows }
end

-- Stores keys and values, given in turn, for `ttl` seconds. `kept` of these texts are what gateways keep.
function commands.announce(worker, ttl, kept, ...)
  for _, gone in ipairs(call('ZRANGE', WORKERS, '-inf', now, 'BYSCORE')) do
    call('ZREM', WORKERS, gone)
    changed(gone)
  end
  local texts, news_of_worker = { ... }, call('ZADD', WORKERS, now + ttl, worker) == 1
  for index = 1, #texts, 2 do
    local key, text = texts[index], texts[index + 1]
    if index < 2 * kept then
      news_of_worker = call('GET', key) ~= text or news_of_worker
    end
    call('SET', key, text, 'EX', ttl)
  end
  if news_of_worker and tonumber(kept) > 0 then
    changed(worker)
  end
  keep_changes()
  return 1
end

function commands.retire(worker)
  call('DEL', WORKER_MODELS .. worker, ANNOUNCEMENT .. worker, WORKER_METRICS .. worker, CALL .. worker)
  call('ZREM', WORKERS, worker)
  changed(worker)
  return 1
end
