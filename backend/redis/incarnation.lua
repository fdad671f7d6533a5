-- Returns the incarnation, made anew if there is none or if it is another server's.
-- KEYS  1 incarnation
-- ARGV  1 a new id  2 ttl, ms  3 "1": a restart loses nothing, so any server's is good
--       4 push channel of a probe, or empty
-- Returns "run_id id time". INFO costs 4 us; it runs on the node that has the slot.
local t = redis.call('TIME')
local server = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)') or '0'
local v = redis.call('GET', KEYS[1])
if not v or not string.match(v, '^%x+ %x+$') or (ARGV[3] ~= '1' and string.match(v, '^%x+') ~= server) then
  v = server .. ' ' .. ARGV[1]
  redis.call('SET', KEYS[1], v, 'PX', ARGV[2])
elseif redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
if ARGV[4] ~= '' then redis.call('PUBLISH', ARGV[4], '') end
return v .. ' ' .. t[1] * 1000 + math.floor(t[2] / 1000)
