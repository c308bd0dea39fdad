-- The queue's every atomic step. service/queue.py prepends the constants and calls `commands[ARGV[1]]`.
--
-- A job is a hash with a status; WAITING lists exactly the jobs whose status is waiting; an entry of a queue stream is
-- pending in the consumer group exactly while its job runs. Each command keeps these three in step, on Redis's clock.
-- Replies are {result, jobs that ended by the way}.

local call = redis.call
local time = call('TIME')
local now = string.format('%d.%06d', time[1], time[2])
local ended = {}

local function record(id)
  return call('HGETALL', JOB .. id)
end

local function fields(id, ...)
  return unpack(call('HMGET', JOB .. id, ...))
end

local function member(id)
  return id .. ':' .. fields(id, 'model')
end

local function emit(id, event)
  local event_id = call('XADD', EVENTS .. id, '*', 'event', event)
  call('PUBLISH', NEWS, id)
  return event_id
end

-- The picture an event previews, nil if it is no preview; the messages' fields are always in this order.
local function previewed(entry)
  return string.match(entry[2][2], '^{"type":"preview","index":(%d+),')
end

-- Holds a job's events to `cap` at the cost of its oldest previews. The others are few, and no watcher may miss one.
local function shed_previews(id, cap, newest)
  local stream, from = EVENTS .. id, fields(id, 'shed') or '-'
  local excess = call('XLEN', stream) - cap
  while excess > 0 do
    local oldest = call('XRANGE', stream, from, '+', 'COUNT', 1)[1]
    if oldest[1] == newest then
      break
    elseif previewed(oldest) then
      call('XDEL', stream, oldest[1])
      excess = excess - 1
    end
    from = '(' .. oldest[1]
    call('HSET', JOB .. id, 'shed', from)
  end
end

local function without_stale_previews(entries)
  local seen, kept = {}, {}
  for index = #entries, 1, -1 do
    local picture = previewed(entries[index])
    if not picture or not seen[picture] then
      table.insert(kept, 1, entries[index])
    end
    seen[picture or ''] = true
  end
  return kept
end

local function enqueue(id, class, deadline)
  local stream = QUEUE .. class .. ':' .. fields(id, 'model')
  local entry = call('XADD', stream, '*', 'job', id)
  call('HSET', JOB .. id, 'status', 'waiting', 'stream', stream, 'entry', entry)
  call('ZADD', WAITING, deadline, member(id))
end

-- Only for delivered entries: deleting others would make the group's lag unknown.
local function drop(stream, entry)
  redis.pcall('XACK', stream, GROUP, entry) -- a lost group has nothing to acknowledge
  call('XDEL', stream, entry)
end

-- Resets an entry's idle time and nothing else. A lost group is claim's to mend.
local function heard(stream, entry)
  redis.pcall('XCLAIM', stream, GROUP, CONSUMER, 0, entry, 'JUSTID')
end

local function start(id, stream, entry, worker, token)
  call('ZREM', WAITING, member(id))
  local attempt = call('HINCRBY', JOB .. id, 'attempt', 1)
  call('HSET', JOB .. id, 'status', 'running', 'owner', worker, 'stream', stream, 'entry', entry)
  call('HSETNX', JOB .. id, 'started_at', now)
  call('HSET', TAKEN .. worker, 'token', token, 'job', id, 'attempt', attempt)
  call('EXPIRE', TAKEN .. worker, RESULT_TTL)
  return record(id)
end

-- The job that a worker's call with this token started before; nil if there is none, or it runs no more. A worker that
-- had no answer asks again with the same token, or the job would wait for it in vain until the claim is idle.
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

-- The one way to end a job. The entry of a job that never ran stays queued until a claim comes across it.
local function finish(id, status, event, ...)
  local was, stream, entry = fields(id, 'status', 'stream', 'entry')
  if was == 'running' then
    drop(stream, entry)
  end
  call('ZREM', WAITING, member(id))
  call('HSET', JOB .. id, 'status', status, 'finished_at', now, 'last_event', emit(id, event), ...)
  for _, key in ipairs({ JOB .. id, EVENTS .. id, IMAGES .. id, SOURCES .. id }) do
    call('EXPIRE', key, RESULT_TTL)
  end
  call('SREM', IN_FLIGHT .. (fields(id, 'tenant') or ''), id)
end

local function finish_unasked(id, ...)
  finish(id, ...)
  table.insert(ended, record(id))
end

local function expire_overdue()
  for _, overdue in ipairs(call('ZRANGE', WAITING, '-inf', now, 'BYSCORE')) do
    local id = string.match(overdue, '^[^:]+')
    if call('EXISTS', JOB .. id) == 1 then
      finish_unasked(id, 'expired', EXPIRED)
    else -- someone deleted it by hand; every command passes here, so this must not raise
      call('ZREM', WAITING, overdue)
    end
  end
end

-- A claim's worker, attempt, stream and entry all have to be those of the job as it runs now. Entry and attempt tell one
-- start of a job from another, the stream tells apart entries made in one millisecond, and the worker tells apart two
-- claims of one number, as a fail-over to a replica that lagged behind can make them.
local function owned(id, worker, attempt, stream, entry)
  local status, its_worker, its_attempt, its_stream, its_entry =
    fields(id, 'status', 'owner', 'attempt', 'stream', 'entry')
  return status == 'running' and its_worker == worker and its_attempt == attempt and its_stream == stream
    and its_entry == entry
end

-- The next entry of a stream that no one has been given, and its job; nil if there is none.
local function read_new(stream)
  local read = { 'XREADGROUP', 'GROUP', GROUP, CONSUMER, 'COUNT', 1, 'STREAMS', stream, '>' }
  local reply = redis.pcall(unpack(read))
  if reply and reply.err then -- no such group: a new stream, or one that was flushed
    redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
    reply = call(unpack(read))
  end
  if reply then
    local entry = reply[1][2][1]
    return entry[1], entry[2][2]
  end
end

-- Whether a tenant may have another job. A job that someone deleted by hand does not count for ever.
local function may_start(tenant)
  local key = IN_FLIGHT .. tenant
  if MAX_IN_FLIGHT == 0 or call('SCARD', key) < MAX_IN_FLIGHT then
    return true
  end
  for _, id in ipairs(call('SMEMBERS', key)) do
    if call('EXISTS', JOB .. id) == 0 then
      call('SREM', key, id)
    end
  end
  return call('SCARD', key) < MAX_IN_FLIGHT
end

-- Takes `pictures` from a tenant's bucket, which fills by RATE_LIMIT a minute up to RATE_BURST; a request for more than
-- that leaves a debt. Returns the seconds to wait if there are too few, else 0.
local function seconds_to_wait(tenant, pictures)
  if RATE_LIMIT == 0 then
    return 0
  end
  local key, a_second = RATE .. tenant, RATE_LIMIT / 60
  local left, at = unpack(call('HMGET', key, 'left', 'at'))
  left = math.min(RATE_BURST, (left or RATE_BURST) + math.max(0, now - (at or now)) * a_second)
  local needed = math.min(pictures, RATE_BURST)
  if left < needed then
    return math.ceil((needed - left) / a_second)
  end
  left = left - pictures
  call('HSET', key, 'left', left, 'at', now)
  call('EXPIRE', key, math.ceil((RATE_BURST - left) / a_second))
  return 0
end

local commands = {}

function commands.submit(id, model, priority, request, deadline_seconds, idempotency_key, fingerprint, tenant, pictures,
                         trace, ...)
  if idempotency_key ~= '' then
    local first, its_fingerprint = unpack(call('HMGET', idempotency_key, 'job', 'fingerprint'))
    if first and its_fingerprint ~= fingerprint then
      return { 'conflict' }
    end
    if first and call('EXISTS', JOB .. first) == 1 then
      return { 'ok', record(first) }
    end
  end
  if call('EXISTS', JOB .. id) == 1 then
    return { 'ok', record(id) }
  end
  if call('ZCARD', WAITING) >= MAX_WAITING then
    return { 'full' }
  end
  if not may_start(tenant) then
    return { 'busy' }
  end
  local wait = seconds_to_wait(tenant, tonumber(pictures))
  if wait > 0 then
    return { 'limited', wait }
  end
  call('HSET', JOB .. id, 'id', id, 'model', model, 'request', request, 'created_at', now, 'attempt', 0)
  if tenant ~= '' then
    call('HSET', JOB .. id, 'tenant', tenant)
  end
  if trace ~= '' then
    call('HSET', JOB .. id, 'trace', trace)
  end
  if MAX_IN_FLIGHT > 0 then
    call('SADD', IN_FLIGHT .. tenant, id)
  end
  if ... then
    call('HSET', SOURCES .. id, ...)
  end
  enqueue(id, priority, deadline_seconds == '' and '+inf' or now + deadline_seconds)
  emit(id, QUEUED)
  if idempotency_key ~= '' then
    call('HSET', idempotency_key, 'job', id, 'fingerprint', fingerprint)
    call('EXPIRE', idempotency_key, IDEMPOTENCY_TTL)
  end
  return { 'ok', record(id) }
end

function commands.read(id)
  return record(id)
end

-- A watcher for whom there is more than this has fallen behind: it gets only the newest preview of each picture.
function commands.news(id, after, count, bytes)
  local status, last_event = fields(id, 'status', 'last_event')
  local entries, size = call('XRANGE', EVENTS .. id, '(' .. after, '+', 'COUNT', count), 0
  for _, entry in ipairs(entries) do
    size = size + #entry[2][2]
  end
  if #entries == tonumber(count) or size > tonumber(bytes) then
    entries = without_stale_previews(entries)
  end
  return { status, last_event, entries }
end

function commands.waiting()
  return call('ZRANGE', WAITING, 0, -1)
end

-- {model, seconds its longest waiting job has waited} of each model that has any; ids sort by the time they were made.
function commands.oldest()
  local first, ages = {}, {}
  for _, waiting in ipairs(call('ZRANGE', WAITING, 0, -1)) do
    local id, model = string.match(waiting, '^([^:]+):(.*)$')
    if not first[model] or id < first[model] then
      first[model] = id
    end
  end
  for model, id in pairs(first) do
    local created_at = fields(id, 'created_at')
    if created_at then -- else someone deleted it by hand
      table.insert(ages, { model, string.format('%.6f', now - created_at) })
    end
  end
  return ages
end

function commands.cancel(id)
  local status = fields(id, 'status')
  if status == 'waiting' then
    finish_unasked(id, 'cancelled', CANCELLED)
  elseif status == 'running' then
    call('HSET', JOB .. id, 'cancel', 1)
  end
  return record(id)
end

-- KEYS: queue streams, most urgent first. Returns {the started job, nothing}, or if there is none
-- {nothing, the entry of each stream after which to wait for more}.
function commands.claim(worker, token)
  local before, seen = started_before(worker, token), {}
  if before then
    return { before, {} }
  end
  for index, stream in ipairs(KEYS) do
    for _ = 1, SKIPS do
      local entry, id = read_new(stream)
      if not entry then
        local newest = call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]
        seen[index] = newest and newest[1] or '0-0'
        break
      end
      local status, current = fields(id, 'status', 'entry')
      if status == 'waiting' and current == entry then
        return { start(id, stream, entry, worker, token), {} }
      elseif status ~= 'running' then -- it ended before its turn; a running one is seen again if its group was lost
        drop(stream, entry)
      end
      seen[index] = entry
    end
  end
  return { {}, seen }
end

-- KEYS as for claim. Returns {the restarted job, nothing}; empty if no entry is idle.
function commands.reclaim(worker, token)
  local before = started_before(worker, token)
  if before then
    return { before, {} }
  end
  for _, stream in ipairs(KEYS) do
    local function idle()
      local pending = redis.pcall('XPENDING', stream, GROUP, 'IDLE', CLAIM_IDLE_MS, '-', '+', 1)
      return not pending.err and pending[1] and pending[1][1] or nil -- an error is a group that is not there yet
    end
    for entry in idle do
      local found = call('XRANGE', stream, entry, entry)[1]
      local id = found and found[2][2]
      local status, current, cancel, attempt, owner
      if id then
        status, current, cancel, attempt, owner = fields(id, 'status', 'entry', 'cancel', 'attempt', 'owner')
      end
      if status ~= 'running' or current ~= entry then
        drop(stream, entry)
      elseif cancel then
        finish_unasked(id, 'cancelled', CANCELLED)
      elseif tonumber(attempt) >= MAX_ATTEMPTS then
        finish_unasked(id, 'failed', DEAD_LETTER, 'error', DEAD_LETTER_ERROR)
        call('XADD', DEAD_LETTERS, 'MAXLEN', '~', DEAD_LETTERS_KEPT, '*', 'job', id, 'worker', owner,
          'attempts', attempt, 'error', DEAD_LETTER_ERROR, 'request', fields(id, 'request'))
      else
        call('XCLAIM', stream, GROUP, CONSUMER, 0, entry, 'JUSTID')
        return { start(id, stream, entry, worker, token), {} }
      end
    end
  end
  return { {}, {} }
end

function commands.heartbeat(id, worker, attempt, stream, entry)
  if not owned(id, worker, attempt, stream, entry) then
    return 'lost'
  end
  local cancel = fields(id, 'cancel')
  heard(stream, entry)
  return cancel and 'cancelled' or 'ok'
end

function commands.publish(id, worker, attempt, stream, entry, event, cap)
  if not owned(id, worker, attempt, stream, entry) then
    return 0
  end
  shed_previews(id, tonumber(cap), emit(id, event))
  return 1
end

function commands.store_image(id, worker, attempt, stream, entry, index, data, event)
  if not owned(id, worker, attempt, stream, entry) then
    return 0
  end
  call('HSET', IMAGES .. id, index, data)
  emit(id, event)
  return 1
end

function commands.finish(id, worker, attempt, stream, entry, status, event, ...)
  if not owned(id, worker, attempt, stream, entry) then
    return 0
  end
  finish(id, status, event, ...)
  return 1
end

function commands.release(id, worker, attempt, stream, entry)
  if not owned(id, worker, attempt, stream, entry) then
    return 0
  end
  local cancel = fields(id, 'cancel')
  if cancel then
    finish_unasked(id, 'cancelled', CANCELLED)
  else
    drop(stream, entry)
    call('HINCRBY', JOB .. id, 'attempt', -1)
    enqueue(id, RETURNED, '+inf') -- it did start by its deadline
  end
  return 1
end

-- What each worker in the list announced under a prefix; those whose announcement has ended say nothing.
function commands.announced(prefix)
  local found = {}
  for _, worker in ipairs(call('ZRANGE', WORKERS, 0, -1)) do
    local text = call('GET', prefix .. worker)
    if text then
      found[#found + 1] = { worker, text }
    end
  end
  return found
end

function commands.announce(worker, key, value, ttl)
  call('ZREMRANGEBYSCORE', WORKERS, '-inf', now)
  call('ZADD', WORKERS, now + ttl, worker)
  call('SET', key, value, 'EX', ttl)
  return 1
end

expire_overdue()
local command = table.remove(ARGV, 1)
local result = commands[command](unpack(ARGV))
return { result, ended }
