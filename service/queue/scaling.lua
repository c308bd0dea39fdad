-- What an autoscaler must know even if all workers are dead: the jobs that they hold, and the models that they served.

-- {model, its jobs that a worker holds, dead or alive} for each stream. In a plain stream, exactly the entries of running
-- jobs are pending. In a special one, those of waiting jobs are too.
function commands.held()
  local found = {}
  for _, stream in ipairs(call('SMEMBERS', STREAMS)) do
    local held = 0
    if special(stream) then
      for _, entry in ipairs(call('XRANGE', stream, '-', '+', 'COUNT', SKIPS)) do
        held = held + (fields(entry[2][2], 'status') == 'running' and 1 or 0)
      end
    else
      local pending = redis.pcall('XPENDING', stream, GROUP)
      held = pending.err and 0 or pending[1] -- an error means that no worker has read this stream yet
    end
    table.insert(found, { string.match(string.sub(stream, #QUEUE + 1), '^[^:]*:(.*)$'), held })
  end
  return found
end

-- Keeps the card of each model, and what its worker can do, for `ttl` seconds. Given in turn: name, cards, announcement.
function commands.remember(ttl, ...)
  local texts = { ... }
  for index = 1, #texts, 3 do
    local name, key = texts[index], REMEMBERED_MODEL .. texts[index]
    call('ZADD', REMEMBERED, now + ttl, name)
    call('HSET', key, 'cards', texts[index + 1], 'announcement', texts[index + 2])
    call('EXPIRE', key, ttl)
  end
  return 1
end

-- {cards, announcement} of each model that is remembered.
function commands.remembered()
  local found = {}
  call('ZREMRANGEBYSCORE', REMEMBERED, '-inf', now)
  for _, name in ipairs(call('ZRANGE', REMEMBERED, 0, -1)) do
    local cards, announcement = unpack(call('HMGET', REMEMBERED_MODEL .. name, 'cards', 'announcement'))
    if cards then
      table.insert(found, { cards, announcement })
    end
  end
  return found
end
