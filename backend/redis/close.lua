-- Appends the close marker, unless there is one.
-- KEYS  1 head  2 stream  3 incarnation
-- ARGV  1 id  2 ttl of all of it, ms  3 push channel
-- Returns "closed epoch seq time": the marker's position.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local epoch, seq, last, kind
local head = redis.call('GET', KEYS[1])
if head then
  epoch, seq, last, kind = string.match(head, '^D1 (%d+) (%d+) %d+ (%x+) %x+ %d+ ([mc])\n$')
  if not epoch then return redis.error_reply('DCHANNEL the head of this channel is not ours') end
  if kind == 'c' then return 'closed ' .. epoch .. ' ' .. seq .. ' ' .. now end
else
  epoch, seq, last = t[1] .. string.format('%06d', t[2]), '0', '00000000000000000000000000000000'
  redis.call('DEL', KEYS[2])
end
seq = seq + 1
head = 'D1 ' .. epoch .. ' ' .. seq .. ' 1 ' .. ARGV[1] .. ' ' .. last .. ' ' .. now .. ' c\n'
redis.call('XADD', KEYS[2], epoch .. '-' .. seq, 'h', head, 'd', '')
redis.call('PEXPIRE', KEYS[2], ARGV[2])
redis.call('SET', KEYS[1], head, 'PX', ARGV[2])
-- The incarnation outlives every log that it speaks for.
if redis.call('PTTL', KEYS[3]) < tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[3], ARGV[2]) end
redis.call('PUBLISH', ARGV[3], head)
return 'closed ' .. epoch .. ' ' .. seq .. ' ' .. now
