-- Batches: files of requests that come into the queue a few at a time, at low priority.
--
-- A batch is a hash with a status. BATCH_INPUT has the lines of its file, and `next` is the first line that is neither
-- queued nor refused: only the command that settles exactly this line moves it on, in the same call that queues the
-- job. So any number of gateways may feed a batch, and die while they do: no line is lost, and none is queued twice.
-- BATCH_RESULTS has "OUTCOME JSON" for each settled line; the JSON of a line with a job begins with the job's id.
-- BATCH_FLYING has the job of each line whose job has not been seen to end.
-- batch_files.lua has the files, and what is in the object store.

local BATCH_FIELDS = { 'status', 'tenant', 'next', 'length', 'expires_at', 'ending' }

local function batch_fields(id)
  local status, tenant, next_line, length, expires_at, ending = unpack(call('HMGET', BATCH .. id, unpack(BATCH_FIELDS)))
  return status, tenant, tonumber(next_line), tonumber(length), tonumber(expires_at), ending
end

local function batch_record(id)
  return call('HGETALL', BATCH .. id)
end

local function job_of(result)
  return string.match(result, '^%l+ {"job": "(%w+)"')
end

-- Begins a batch with a copy of the file's lines, or of where they are, so that the file may be deleted at any time.
function commands.create_batch(id, file, tenant, window, idempotency_key, fingerprint, ...)
  if idempotency_key ~= '' then
    local first, its_fingerprint = unpack(call('HMGET', idempotency_key, 'batch', 'fingerprint'))
    if first and its_fingerprint ~= fingerprint then
      return { 'conflict' }
    end
    if first and call('EXISTS', BATCH .. first) == 1 then
      call('HSET', idempotency_key, 'batch', first)  -- the caller waits for replicas to have what it wrote
      return { 'ok', batch_record(first) }
    end
  end
  local its_tenant, length, requests, bytes, apart, dropped =
    unpack(call('HMGET', FILE .. file, 'tenant', 'length', 'requests', 'bytes', 'apart', 'dropped'))
  length = length or apart
  if its_tenant ~= tenant or not length or dropped then
    return { 'missing' }
  end
  if call('SCARD', BATCHES_OPEN_OF .. tenant) >= MAX_OPEN_BATCHES then
    return { 'busy' }
  end
  local results = BATCH_LINE_BYTES * length
  local refused = refuse_without_room((apart and 0 or bytes) + results, HALF.memory)
  if refused then
    return refused
  end
  reserve(BATCH .. id, results, REVIEW_SECONDS)
  call('COPY', FILE_LINES .. file, BATCH_INPUT .. id)
  call('PERSIST', BATCH_INPUT .. id)
  call('HSET', BATCH .. id, 'id', id, 'tenant', tenant, 'input_file', file, 'created_at', now, 'expires_at',
    now + window, 'status', 'in_progress', 'length', length, 'total', requests, 'next', 0, 'completed', 0, 'failed', 0,
    ...)
  if apart then
    call('HSET', BATCH .. id, 'apart', 1, 'archived', 0) -- whoever moves results also says that the lines may go
    call('SADD', FILE_USERS .. file, id)
    call('EXPIRE', FILE_USERS .. file, math.max(call('TTL', FILE_USERS .. file), window + BATCH_TTL))
  end
  call('ZADD', BATCHES_OPEN, now, id)
  call('SADD', BATCHES_OPEN_OF .. tenant, id)
  call('ZADD', BATCHES_OF .. tenant, now, id)
  if idempotency_key ~= '' then
    call('HSET', idempotency_key, 'batch', id, 'fingerprint', fingerprint)
    call('EXPIRE', idempotency_key, IDEMPOTENCY_TTL)
  end
  return { 'ok', batch_record(id) }
end

-- Tells whether this gateway may feed: one at a time, until `ms` have passed without a call from it. This only saves
-- work; nothing depends on it.
function commands.lead_batches(gateway, ms)
  local leader = call('GET', BATCH_LEADER)
  if leader and leader ~= gateway then
    return 0
  end
  call('SET', BATCH_LEADER, gateway, 'PX', ms)
  return 1
end

function commands.stop_leading(gateway)
  return call('GET', BATCH_LEADER) == gateway and call('DEL', BATCH_LEADER) or 0
end

local function may_settle(id, line)
  local status, _, next_line, _, _, ending = batch_fields(id)
  return status == 'in_progress' and not ending and next_line == tonumber(line)
end

local function settle(id, line, custom_id, result)
  call('HSET', BATCH .. id, 'next', line + 1)
  call('HDEL', BATCH .. id, 'waiting_for')
  if custom_id ~= '' then
    call('SADD', BATCH_NAMES .. id, custom_id)
  end
  if result ~= '' then
    call('HSET', BATCH_RESULTS .. id, line, result)
  end
end

-- Seconds for which a batch that has not ended, its jobs and its results may be needed.
local function kept_for(expires_at)
  return math.ceil(math.max(0, expires_at - now)) + BATCH_TTL + RESULT_TTL
end

-- Queues the job of a batch's next line; `...` are the arguments of submit.
function commands.feed_line(id, line, custom_id, result, ...)
  if not may_settle(id, line) then
    return { 'stale' }
  end
  if call('SISMEMBER', BATCH_NAMES .. id, custom_id) == 1 then
    return { 'duplicate' }
  end
  if call('SCARD', BATCH_JOBS) >= BATCH_IN_FLIGHT * math.max(1, call('ZCARD', WORKERS)) then
    return { 'enough' }
  end
  local reply, job = submit(HALF, ...), ...
  if reply[1] == 'ok' then
    local _, _, _, _, expires_at = batch_fields(id)
    call('HSET', JOB .. job, 'keep', kept_for(expires_at))
    settle(id, line, custom_id, result)
    call('HSET', BATCH_FLYING .. id, line, job)
    call('SADD', BATCH_JOBS, job)
  end
  return reply
end

-- Settles a batch's next line without a job: refused with `result`, or empty and passed over.
function commands.settle_line(id, line, custom_id, result)
  if not may_settle(id, line) then
    return 0
  end
  settle(id, line, custom_id, result)
  if result ~= '' then
    call('HINCRBY', BATCH .. id, 'failed', 1)
  end
  return 1
end

function commands.cancel_batch(id)
  local status, _, _, _, _, ending = batch_fields(id)
  if status == 'in_progress' and not ending then
    call('HSET', BATCH .. id, 'status', 'cancelling', 'cancelling_at', now, 'ending', 'cancelled')
  end
  return batch_record(id)
end

-- Notes how a line's job ended. Nobody watches it, so its events go; its pictures stay as long as the batch may need.
local function collect(id, line, job, outcome)
  local result = call('HGET', BATCH_RESULTS .. id, line) or '{}' -- missing if someone deleted it by hand
  call('HSET', BATCH_RESULTS .. id, line, outcome .. ' ' .. string.match(result, '{.*$'))
  call('HDEL', BATCH_FLYING .. id, line)
  call('SREM', BATCH_JOBS, job)
  call('UNLINK', EVENTS .. job)
  if call('HEXISTS', SOURCES .. job, REFERRED .. 'image') == 0 then -- what is elsewhere is deleted with the batch
    call('UNLINK', SOURCES .. job)
  end
  local kept = fields(job, 'keep')
  if kept then -- older workers let the job go sooner
    call('EXPIRE', JOB .. job, kept)
    call('EXPIRE', IMAGES .. job, kept)
    call('EXPIRE', SOURCES .. job, kept)
  end
end

-- Collects the jobs that have ended, and cancels the others if the batch is ending. Returns {line outcomes, jobs left}.
local function collect_ended(id, ending)
  local outcomes, left, flying = {}, 0, call('HGETALL', BATCH_FLYING .. id)
  for index = 1, #flying, 2 do
    local line, job = flying[index], flying[index + 1]
    if ending then
      commands.cancel(job)
    end
    local status = fields(job, 'status')
    if status == 'waiting' or status == 'running' then
      left = left + 1
    else
      local outcome = status == 'completed' and 'completed' or status == 'cancelled' and 'cancelled' or 'failed'
      collect(id, line, job, outcome)
      table.insert(outcomes, outcome)
      if outcome == 'completed' then
        call('HINCRBY', BATCH .. id, 'completed', 1)
      elseif outcome == 'failed' or not ending then
        call('HINCRBY', BATCH .. id, 'failed', 1)
      end
    end
  end
  return outcomes, left
end

-- `owner`: the field that names the batch. Versions that know no results in the object store know `batch` only.
local function add_result_file(id, tenant, kind, owner)
  local file = kind .. '-' .. id
  commands.add_file(file, tenant, BATCH_TTL, owner, id, 'kind', kind, 'purpose', 'batch_output', 'filename',
    'batch_' .. id .. '_' .. kind .. '.jsonl')
  call('HSET', BATCH .. id, kind .. '_file', file)
end

local function end_batch(id, ending)
  local _, tenant, next_line, length = batch_fields(id)
  local total, completed, failed, archived =
    unpack(call('HMGET', BATCH .. id, 'total', 'completed', 'failed', 'archived'))
  local owner = archived and 'results_of' or 'batch'
  if tonumber(completed) > 0 then
    add_result_file(id, tenant, 'output', owner)
  end
  if tonumber(completed) < tonumber(total) or tonumber(failed) > 0 then -- an empty line fails too if it cannot be read
    add_result_file(id, tenant, 'error', owner)
  end
  call('HSET', BATCH .. id, 'status', ending, ending .. '_at', now, 'kept_until', now + BATCH_TTL)
  call('UNLINK', BATCH_NAMES .. id, BATCH_FLYING .. id)
  if next_line >= length or (archived and tonumber(archived) >= length) then
    call('UNLINK', BATCH_INPUT .. id)
  end
  for _, key in ipairs({ BATCH .. id, BATCH_RESULTS .. id, BATCH_INPUT .. id }) do
    call('EXPIRE', key, BATCH_TTL)
  end
  call('ZREM', BATCHES_OPEN, id)
  call('SREM', BATCHES_OPEN_OF .. tenant, id)
  unreserve(BATCH .. id)
end

-- Lets all results of a batch expire together, a part at each call: there may be fifty thousand.
local function finalize(id, ending)
  local cursor, archived, length, kept = unpack(call('HMGET', BATCH .. id, 'scanned', 'archived', 'length', 'rest_kept'))
  if archived and tonumber(archived) < tonumber(length) and not kept then
    return
  end
  local reply = call('HSCAN', BATCH_RESULTS .. id, cursor or 0, 'COUNT', 500)
  for index = 2, #reply[2], 2 do
    local job = job_of(reply[2][index])
    if job then
      call('EXPIRE', JOB .. job, BATCH_TTL)
      call('EXPIRE', IMAGES .. job, BATCH_TTL)
      call('EXPIRE', SOURCES .. job, BATCH_TTL)
    end
  end
  call('HSET', BATCH .. id, 'scanned', reply[1])
  if reply[1] == '0' then
    end_batch(id, ending)
  end
end

-- The status of each batch that has not ended.
function commands.batch_states()
  local states = {}
  for _, id in ipairs(call('ZRANGE', BATCHES_OPEN, 0, -1)) do
    table.insert(states, call('HGET', BATCH .. id, 'status') or 'unknown')
  end
  return states
end

-- Moves a batch on as far as its jobs have come. Returns {record, outcomes of the lines that this call saw end}.
function commands.step_batch(id)
  local status, _, next_line, length, expires_at, ending = batch_fields(id)
  if not status then -- someone deleted it by hand
    call('ZREM', BATCHES_OPEN, id)
    return { {}, {} }
  end
  local outcomes = {}
  if status == 'finalizing' then
    finalize(id, ending)
  elseif status == 'in_progress' or status == 'cancelling' then
    if not ending and now - expires_at >= 0 then
      ending = 'expired'
      call('HSET', BATCH .. id, 'ending', ending)
    end
    local left
    outcomes, left = collect_ended(id, ending)
    if left == 0 and (ending or next_line >= length) then
      call('HSET', BATCH .. id, 'status', 'finalizing', 'finalizing_at', now, 'ending', ending or 'completed')
      call('HDEL', BATCH .. id, 'waiting_for')
    end
  end
  return { batch_record(id), outcomes }
end

-- Deletes the results of an ended batch, a part at each call: the pictures only, or everything. Returns the cursor for
-- the next call, or '0' after the last.
function commands.forget_batch(id, cursor, everything)
  local status, tenant = batch_fields(id)
  if status and call('ZSCORE', BATCHES_OPEN, id) then
    return 'open'
  end
  local reply = call('HSCAN', BATCH_RESULTS .. id, cursor, 'COUNT', 500)
  for index = 2, #reply[2], 2 do
    local job = job_of(reply[2][index])
    if job then
      call('UNLINK', IMAGES .. job, SOURCES .. job)
      if everything == '1' then
        call('UNLINK', JOB .. job)
      end
    end
  end
  if reply[1] == '0' and everything == '1' and status then
    local files = call('HMGET', BATCH .. id, 'output_file', 'error_file')
    for _, file in ipairs({ files[1] or '', files[2] or '' }) do
      call('UNLINK', FILE .. file, FILE_LINES .. file)
    end
    call('UNLINK', BATCH .. id, BATCH_RESULTS .. id, BATCH_INPUT .. id)
    call('ZREM', BATCHES_OF .. tenant, id)
  end
  return reply[1]
end
