-- Room in memory: what accepted jobs may still come to hold is reserved before they are accepted.
--
-- RESERVED has the bytes of each reservation, under the key of its job, batch or file, and their sum under `total`.
-- What is stored already is in the server's own figure. So a reservation ends with its job, whose result then counts
-- as what it takes, until it expires. RESERVED_UNTIL has the time to look whether that end was missed: an older version
-- ended the job, or someone deleted it by hand.

-- Bytes that the server uses, its own limit for them, and the smaller of that and ours; 0 = no limit.
local function memory()
  local info = call('INFO', 'memory')
  local function read(name)
    return tonumber(string.match(info, '\n' .. name .. ':(%d+)') or 0)
  end
  local own, limit = read('maxmemory'), MEMORY_BYTES
  if limit == 0 or own > 0 and own < limit then
    limit = own
  end
  return read('used_memory') - read('mem_not_counted_for_evict'), own, limit
end

local function reserved()
  return tonumber(call('HGET', RESERVED, 'total') or 0)
end

local function unreserve(key)
  local bytes = call('HGET', RESERVED, key)
  if bytes then
    call('HDEL', RESERVED, key)
    call('HINCRBY', RESERVED, 'total', -bytes)
    call('ZREM', RESERVED_UNTIL, key)
  end
end

-- Reserves bytes until `unreserve`; at most for `seconds`, unless a record that does not expire is under `key` then.
local function reserve(key, bytes, seconds)
  if bytes > 0 then
    unreserve(key)
    call('HSET', RESERVED, key, string.format('%.0f', bytes))
    call('HINCRBY', RESERVED, 'total', string.format('%.0f', bytes))
    call('ZADD', RESERVED_UNTIL, now + seconds, key)
  end
end

-- Ends the reservations whose job or batch has ended, a part at each call.
local function review_reservations()
  for _, key in ipairs(call('ZRANGE', RESERVED_UNTIL, '-inf', now, 'BYSCORE', 'LIMIT', 0, REVIEWED)) do
    if call('TTL', key) == -1 then
      call('ZADD', RESERVED_UNTIL, now + REVIEW_SECONDS, key)
    else
      unreserve(key)
    end
  end
end

-- A refusal if `bytes` more do not fit into a share of the memory: {'crowded', bytes, free, most}. Otherwise nil.
local function refuse_without_room(bytes, share)
  review_reservations()
  local used, _, limit = memory()
  local most = share * limit
  local free = most - used - reserved()
  if limit > 0 and bytes > free then
    return { 'crowded', bytes, math.max(0, free), most }
  end
end

-- {used, the server's limit, reserved, limit of both together when a job is accepted}, in bytes.
function commands.memory()
  review_reservations()
  local used, own, limit = memory()
  return { used, own, reserved(), WHOLE.memory * limit }
end
