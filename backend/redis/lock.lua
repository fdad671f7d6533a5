-- Does one step on a channel's lock.
-- KEYS  1 head of the log  2 lock  3 line: token -> place  4 known: token -> until when, us
-- ARGV  1 acquire|extend|release|end|state  2 token  3 ttl, ms
--       4 acquire: "1" to line up; release: "1" to void the token; end: fence, or 0 for any
--       5 end: the outcome  6 notices channel  7 info
-- Returns "ok|closed fence held mine ttl remaining waiting\nfence:outcome:token ...\ntoken\ninfo".
-- Without the token there, all who stand in line would have to ask whether it is their turn.
--
-- The lock is a hash: fence, token, until (us; 0 when it is free), ttl (ms) and info of the
-- newest generation; ended, how the last ones did; and, under the tokens of those in the
-- line, "ttl info". A token is known for as long as its place is good; one that is known
-- and has no place is void, and gets nothing.
--
-- All times are read here, and compared here: a key that has expired is a key that was
-- forgotten, and nothing else. Fences are kept as text: Lua writes numbers from 1e14 on
-- as "1e+14" (redis.call writes them in full).
local call = redis.call
local t = call('TIME')
local now = t[1] * 1000000 + t[2]
local op, token, ttl, detail, outcome, notices, info = unpack(ARGV)
local RELEASED, EXPIRED, DAY, VOID = '1', '2', 86400000, 60000000

local r = call('HMGET', KEYS[2], 'fence', 'token', 'until', 'ttl', 'info', 'ended')
local old = r[1]
local fence, owner, deadline = old or '0', r[2] or '', tonumber(r[3] or 0)
local span, about, ended = tonumber(r[4] or 0), r[5] or '', r[6] or ''
local head = call('GET', KEYS[1])
local closed = head and string.sub(head, -3) == ' c\n'
local changed, notify = false, false

local function begin(who, ms, what)
  fence, owner, about = string.format('%.0f', math.max(fence + 1, now)), who, what
  span, deadline, changed = ms, now + ms * 1000, true
end

local function finish(how)
  ended = fence .. ':' .. how .. ':' .. owner .. ' ' .. (string.match(ended, '^' .. string.rep('%S+ ', 7)) or ended)
  deadline, changed, notify = 0, true, true
end

local function leave(who)
  local lease = call('HGET', KEYS[2], who)
  call('ZREM', KEYS[3], who)
  call('ZREM', KEYS[4], who)
  if lease then call('HDEL', KEYS[2], who) end
  return lease
end

-- pass gives a lock that is free to the first in the line. A log that has ended has no
-- use for it.
local function pass()
  while deadline == 0 and not closed do
    local first = call('ZRANGE', KEYS[3], 0, 0)[1]
    if not first then return end
    local lease = leave(first)
    if lease then -- evicted, if not
      local ms, what = string.match(lease, '^(%d+) (.*)$')
      begin(first, tonumber(ms), what)
      notify = true
    end
  end
end

local function keep(key, ms)
  if call('PTTL', key) < ms then call('PEXPIRE', key, ms) end
end

for _, who in ipairs(call('ZRANGEBYSCORE', KEYS[4], '-inf', now)) do leave(who) end
if deadline > now + span * 1000 then -- the clock went back
  deadline, changed = now + span * 1000, true
end
if deadline > 0 and deadline <= now then finish(EXPIRED) end
pass()

local mine = fence ~= '0' and owner == token
local ms = tonumber(ttl)
if op == 'acquire' then
  local place = call('ZSCORE', KEYS[3], token)
  if closed then
    if place then leave(token) end
  elseif mine or string.find(ended, ':' .. token .. ' ', 1, true) or (not place and call('ZSCORE', KEYS[4], token)) then
    -- It has its generation, has had it, or must not get one any more.
  elseif deadline == 0 then
    begin(token, ms, info)
  elseif detail == '1' then
    if not place then
      call('ZADD', KEYS[3], (call('ZRANGE', KEYS[3], -1, -1, 'WITHSCORES')[2] or 0) + 1, token)
    end
    call('ZADD', KEYS[4], now + ms * 1000, token)
    call('HSET', KEYS[2], token, ttl .. ' ' .. info)
    for i = 2, 4 do keep(KEYS[i], DAY + ms) end
  end
elseif op == 'extend' then
  if mine and deadline > 0 then
    span, deadline, changed = ms, now + ms * 1000, true
  end
elseif op == 'release' then
  if mine and deadline > 0 then
    finish(RELEASED)
    pass()
  elseif call('ZSCORE', KEYS[3], token) then
    leave(token)
  end
  if detail == '1' then
    call('ZADD', KEYS[4], now + VOID, token)
    keep(KEYS[4], VOID / 1000)
  end
elseif op == 'end' then
  if deadline > 0 and (detail == '0' or detail == fence) then
    finish(outcome)
    pass()
  end
end

if changed then
  -- A write that needs no memory goes first: then a server that has none lets those
  -- that do follow, and a lock can be released.
  if old then call('PEXPIRE', KEYS[2], DAY + span) end
  call('HSET', KEYS[2], 'fence', fence, 'token', owner, 'until', deadline, 'ttl', span, 'info', about, 'ended', ended)
  keep(KEYS[2], DAY + span)
  if notify then call('PUBLISH', notices, '') end
end
local function bit(b) return b and '1' or '0' end
return table.concat({closed and op == 'acquire' and 'closed' or 'ok', fence, bit(deadline > 0),
  bit(fence ~= '0' and owner == token), string.format('%.0f', span),
  string.format('%.0f', deadline > 0 and math.ceil((deadline - now) / 1000) or 0),
  call('ZCARD', KEYS[3])}, ' ') .. '\n' .. ended .. '\n' .. owner .. '\n' .. about
