-- The end of the script: runs one command.

expire_overdue()
local command = table.remove(ARGV, 1)
local result = commands[command](unpack(ARGV))
return { result, ended }
