-- Files of batches, and what of them is in the object store: of a file whose lines are there, FILE_LINES is a hash of
-- references, and so is BATCH_INPUT of its batches. A batch with `archived` has what became of the lines before that one
-- there too, and ends only when all is there, or when `rest_kept` says that the rest stays here.

-- Newest first: {records of a tenant's batches or files after an id, 1 if there are more}. Expired ones are forgotten.
function commands.list_owned(index, prefix, after, count)
  local found, from = {}, 0
  if after ~= '' then
    local rank = call('ZREVRANK', index, after)
    from = rank and rank + 1 or 0
  end
  while true do
    local id = call('ZREVRANGE', index, from, from)[1]
    if not id or #found > tonumber(count) then
      break
    elseif call('EXISTS', prefix .. id) == 1 then
      table.insert(found, call('HGETALL', prefix .. id))
      from = from + 1
    else
      call('ZREM', index, id)
    end
  end
  local more = #found > tonumber(count)
  if more then
    table.remove(found)
  end
  return { found, more and 1 or 0 }
end

-- Reserves room for a file that is about to be sent, until `add_file`. Returns a refusal, or {'ok'}.
function commands.admit_file(id, bytes, seconds)
  local refused = refuse_without_room(tonumber(bytes), HALF.memory)
  if not refused then
    reserve(FILE .. id, tonumber(bytes), seconds)
  end
  return refused or { 'ok' }
end

-- Gives the room of a file back that could not be stored.
function commands.withdraw_file(id)
  unreserve(FILE .. id)
  return 1
end

-- Shows a file whose lines are all there; `...` are fields and values in turn.
function commands.add_file(id, tenant, ttl, ...)
  call('HSET', FILE .. id, 'id', id, 'tenant', tenant, 'created_at', now, 'expires_at', now + ttl, ...)
  call('EXPIRE', FILE .. id, ttl)
  call('EXPIRE', FILE_LINES .. id, ttl)
  call('ZADD', FILES_OF .. tenant, now, id)
  unreserve(FILE .. id) -- its lines are stored
  return call('HGETALL', FILE .. id)
end

-- Deletes a file. Returns where its lines are if nobody else needs them: then whoever deletes them there deletes the
-- keys too, and may try again before.
function commands.drop_file(id)
  if call('SCARD', FILE_USERS .. id) > 0 or call('TYPE', FILE_LINES .. id).ok ~= 'hash' then
    call('UNLINK', FILE .. id, FILE_LINES .. id)
    return {}
  end
  call('HSET', FILE .. id, 'dropped', 1)
  return call('HVALS', FILE_LINES .. id)
end

-- What stays here of a job whose record is in the object store.
local KEPT = { id = 1, status = 1, tenant = 1, protocol = 1, attempt = 1, last_event = 1 }

local function shorten(job, file, first)
  if call('EXISTS', JOB .. job) == 1 then
    for _, name in ipairs(call('HKEYS', JOB .. job)) do
      if not KEPT[name] then
        call('HDEL', JOB .. job, name)
      end
    end
    call('HSET', JOB .. job, 'apart', file .. ' ' .. first)
  end
end

-- Takes away what became of the lines from `first` to before `last`, because it is in the object store now: `output` and
-- `errors` say where; one may be empty. Returns 1, or 0 if another gateway has done so.
function commands.move_results(id, first, last, output, errors)
  if call('HGET', BATCH .. id, 'archived') ~= first or not call('ZSCORE', BATCHES_OPEN, id) then
    return 0
  end
  for line = tonumber(first), tonumber(last) - 1 do
    local result = call('HGET', BATCH_RESULTS .. id, line)
    if result then
      local outcome, job = string.match(result, '^%l+'), job_of(result)
      call('HSET', BATCH_RESULTS .. id, line, outcome .. (job and ' {"job": "' .. job .. '"}' or ' {}'))
      if job then
        shorten(job, (outcome == 'completed' and 'output-' or 'error-') .. id, first)
      end
    end
  end
  local _, _, _, _, expires_at = batch_fields(id)
  for kind, place in pairs({ output = output, error = errors }) do
    if place ~= '' then
      call('HSET', FILE_LINES .. kind .. '-' .. id, first, place)
      call('EXPIRE', FILE_LINES .. kind .. '-' .. id, kept_for(expires_at))
    end
  end
  -- Older versions would end the batch and show moved lines as null. They scan from `cursor`: now the server refuses that.
  call('HSET', BATCH .. id, 'archived', last, 'cursor', 'moved')
  return 1
end

-- Lets a batch end although not all of it was moved: the gateway that asks has no object store.
function commands.keep_results(id)
  local archived, apart = unpack(call('HMGET', BATCH .. id, 'archived', 'apart'))
  if archived == '0' and not apart then -- nothing of it is in the store
    return call('HDEL', BATCH .. id, 'archived')
  end
  return archived and call('HSET', BATCH .. id, 'rest_kept', 1) or 0
end

-- A batch needs its lines in the object store no more. Returns where they are, if nobody else needs them.
function commands.release_lines(id)
  local file, apart = unpack(call('HMGET', BATCH .. id, 'input_file', 'apart'))
  if not apart then
    return {}
  end
  call('SREM', FILE_USERS .. file, id)
  if call('EXISTS', FILE .. file) == 1 or call('SCARD', FILE_USERS .. file) > 0 then
    return {}
  end
  return call('HVALS', BATCH_INPUT .. id)
end
