-- The end of every script: runs its command, whose name stands for COMMAND.

expire_overdue()
table.remove(ARGV, 1) -- the command's name, for whoever looks on with MONITOR
local result = COMMAND(unpack(ARGV))
for id in pairs(news) do
  call('PUBLISH', NEWS, id)
end
return { result, ended }
