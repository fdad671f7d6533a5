-- Appends one frame.
-- KEYS  1 head  2 stream  3 incarnation
-- ARGV  1 id  2 count  3 age of the frame at sending, ms  4 time of sending, ms by this server's clock
--       5 messages to keep  6 stream ttl, ms  7 head ttl, ms  8 incarnation ttl, ms, or 0: leave it
--       9 push channel  10 data
-- Returns "ok|closed|uncertain epoch seq time".
--
-- Lua makes a hash of every byte of every string that it makes: 64 KiB cost 80 us, so
-- nothing long is put together here. Numbers from 1e14 on it would write as "1e+14":
-- seq and milliseconds are below; the epoch, in microseconds, is kept as text.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local id, data, sent = ARGV[1], ARGV[10], tonumber(ARGV[4])
local epoch, seq, last, time, kind
local head = redis.call('GET', KEYS[1])
if head then
  epoch, seq, last, time, kind = string.match(head, '^D1 (%d+) (%d+) %d+ (%x+) %x+ (%d+) ([mc])\n$')
  if not epoch then return redis.error_reply('DCHANNEL the head of this channel is not ours') end
end

local function answer(what, s) return what .. ' ' .. epoch .. ' ' .. s .. ' ' .. now end

-- find returns the seq of the frame, or false when it is surely not in the log, or
-- nil when nobody can tell. It goes back to entries older than the frame itself.
local function find(cutoff)
  if tonumber(time) < cutoff then return false end
  local first, to = nil, '+'
  repeat
    local some = redis.call('XREVRANGE', KEYS[2], to, '-', 'COUNT', 32)
    for _, e in ipairs(some) do
      local s, n, eid, et = string.match(e[2][2], '^D1 %d+ (%d+) (%d+) (%x+) %x+ (%d+) [mc]\n')
      if s then
        if eid == id then return s end
        if tonumber(et) < cutoff then return false end
        first = s - n
      end
      to = '(' .. e[1]
    end
  until #some < 32
  if first == 0 then return false end
  return nil
end

if head then
  if last == id then return answer('ok', seq) end
  local age = tonumber(ARGV[3])
  if age > 0 or now - sent > 1000 then
    local s = find(math.min(sent, now) - age - 500)
    if s then return answer('ok', s) end
    if s == nil then return answer('uncertain', seq) end
  end
  if kind == 'c' then return answer('closed', seq) end
else
  epoch, seq, last = t[1] .. string.format('%06d', t[2]), '0', '00000000000000000000000000000000'
  redis.call('DEL', KEYS[2]) -- an evicted head's
end

seq = seq + ARGV[2]
head = 'D1 ' .. epoch .. ' ' .. seq .. ' ' .. ARGV[2] .. ' ' .. id .. ' ' .. last .. ' ' .. now .. ' m\n'
redis.call('XADD', KEYS[2], 'MINID', '~', epoch .. '-' .. math.max(seq - ARGV[5] + 1, 0),
  epoch .. '-' .. seq, 'h', head, 'd', data)
redis.call('PEXPIRE', KEYS[2], ARGV[6])
redis.call('SET', KEYS[1], head, 'PX', ARGV[7])
if ARGV[8] ~= '0' and redis.call('PTTL', KEYS[3]) < tonumber(ARGV[8]) then
  redis.call('PEXPIRE', KEYS[3], ARGV[8])
end
if #data <= 4096 then
  redis.call('PUBLISH', ARGV[9], head .. data)
else -- two messages, which nothing comes between
  redis.call('PUBLISH', ARGV[9], 'S' .. #data .. ' ' .. head)
  redis.call('PUBLISH', ARGV[9], data)
end
return answer('ok', seq)
