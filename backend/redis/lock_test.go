package redis_test

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/redis"
	"github.com/dchannel/dchannel/internal/testserver"
)

// locked is one channel's lock in a test. Its methods fail the test on an error.
type locked struct {
	t       testing.TB
	b       *redis.Backend
	channel string
}

func (l locked) acquire(lease dchannel.Lease) dchannel.LockState {
	l.t.Helper()
	return l.ok(l.b.Acquire(ctxFor(l.t), l.channel, lease))
}

// try acquires for so long that nothing expires in a test.
func (l locked) try(token dchannel.ID) dchannel.LockState {
	l.t.Helper()
	return l.acquire(dchannel.Lease{Token: token, TTL: time.Minute})
}

func (l locked) lineUp(token dchannel.ID, ttl time.Duration) dchannel.LockState {
	l.t.Helper()
	return l.acquire(dchannel.Lease{Token: token, TTL: ttl, Fair: true})
}

func (l locked) extend(token dchannel.ID, ttl time.Duration) dchannel.LockState {
	l.t.Helper()
	return l.ok(l.b.Extend(ctxFor(l.t), l.channel, token, ttl))
}

func (l locked) release(token dchannel.ID) dchannel.LockState {
	l.t.Helper()
	return l.ok(l.b.Release(ctxFor(l.t), l.channel, token))
}

func (l locked) end(fence uint64, outcome dchannel.LockOutcome) dchannel.LockState {
	l.t.Helper()
	return l.ok(l.b.EndLock(ctxFor(l.t), l.channel, fence, outcome))
}

func (l locked) state() dchannel.LockState {
	l.t.Helper()
	return l.ok(l.b.LockState(ctxFor(l.t), l.channel))
}

// ok checks what is so of every state.
func (l locked) ok(s dchannel.LockState, err error) dchannel.LockState {
	l.t.Helper()
	require.NoError(l.t, err)
	require.Equal(l.t, s.Held, s.Remaining > 0)
	require.LessOrEqual(l.t, s.Remaining, s.TTL)
	require.Zero(l.t, s.Remaining%time.Millisecond)
	for i, e := range s.Ended {
		if i > 0 {
			require.Less(l.t, e.Fence, s.Ended[i-1].Fence)
		} else if s.Held {
			require.Less(l.t, e.Fence, s.Fence)
		} else {
			require.Equal(l.t, s.Fence, e.Fence, "the end of the newest generation is known")
		}
	}
	return s
}

// expire waits until the server says that the time of a lease with a short TTL is over.
func (l locked) expire() dchannel.LockState {
	l.t.Helper()
	var s dchannel.LockState
	eventually(l.t, "expired", func() bool { s = l.state(); return !s.Held })
	return s
}

func everyLockStep(t *testing.T, b *redis.Backend, channel string) {
	t.Helper()
	l := locked{t, b, channel}
	hints := make(chan struct{}, 100)
	sub, err := b.WatchLock(ctxFor(t), channel, func() { hints <- struct{}{} })
	require.NoError(t, err)
	defer sub.Close()
	one, two := dchannel.NewID(), dchannel.NewID()
	require.True(t, l.try(one).Mine)
	require.Equal(t, 1, l.lineUp(two, time.Minute).Waiting)
	require.True(t, l.extend(one, time.Minute).Mine)
	require.True(t, l.release(one).Held)
	<-hints
	require.True(t, l.lineUp(two, time.Minute).Mine)
	require.False(t, l.end(0, dchannel.LockForced).Held)
	<-hints
	require.Len(t, l.state().Ended, 2)
	l.acquire(dchannel.Lease{Token: dchannel.NewID(), TTL: time.Millisecond})
	l.lineUp(dchannel.NewID(), time.Millisecond)
	l.expire()
	<-hints
	require.NoError(t, b.Remove(ctxFor(t), channel))
	require.Zero(t, l.state())
}

// Each case is a story of one lock; after each step stands what its state must be.
func TestLockStates(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend()
	for _, c := range []struct{ name, story string }{
		{"nothing yet", "state:free; release a:free; extend a:free; end 0:free; end 1:free"},
		{"hold and release", "acquire a:held mine; state:held; release a:free mine released"},
		{"somebody else's", "acquire a:held mine; acquire b:held; extend b:held; release b:held; extend a:held mine"},
		{"again under the token", "acquire a:held mine; acquire a:held mine; release a:free mine released; release a:free mine released"},
		{"a token has one generation", "acquire a:held mine; release a:free mine released; acquire a:free mine released; " +
			"acquire b:held mine released; acquire a:held released; release b:free mine released released; acquire a:free released released"},
		{"extend never begins one", "acquire a:held mine; release a:free mine released; extend a:free mine released"},
		{"expiry", "short a:held mine; expire:free expired; extend a:free mine expired; release a:free mine expired; acquire b:held mine expired"},
		{"expiry seen by Acquire first", "short a:held mine; wait; acquire b:held mine expired"},
		{"expiry seen by Extend first", "short a:held mine; wait; extend a:free mine expired"},
		{"expiry seen by Release first", "short a:held mine; wait; release a:free mine expired"},
		{"expiry seen by EndLock first", "short a:held mine; wait; end 1:free expired"},
		{"by force", "acquire a:held mine; end 1:free forced; extend a:free mine forced; release a:free mine forced; acquire b:held mine forced"},
		{"by force, whichever", "acquire a:held mine; end 0:free forced; end 0:free forced"},
		{"by force, a former one", "acquire a:held mine; release a:free mine released; acquire b:held mine released; end 1:held released; end 2:free forced released"},
		{"closed", "acquire a:held mine; close 1:free closed"},
		{"the last outcomes", "acquire a:held mine; release a:free mine released; short b:held mine released; expire:free expired released; " +
			"acquire c:held mine expired released; end 3:free forced expired released"},
		{"line", "acquire a:held mine; fair b:held waiting 1; fair c:held waiting 2; fair b:held waiting 2; " +
			"release a:held waiting 1 released; fair c:held waiting 1 released; fair b:held mine waiting 1 released; " +
			"end 2:held forced released; fair b:held forced released; fair c:held mine forced released"},
		{"no overtaking", "acquire a:held mine; fair b:held waiting 1; release a:held released; acquire c:held released; acquire b:held mine released"},
		{"out of the line", "acquire a:held mine; fair b:held waiting 1; release b:held; release a:free mine released; acquire b:held mine released"},
		{"fair and free", "fair a:held mine"},
		{"a token that had its generation cannot line up", "acquire a:held mine; release a:free mine released; acquire b:held mine released; fair a:held released"},
		{"handed over at expiry", "short a:held mine; fair b:held waiting 1; fair c:held waiting 2; wait; state:held waiting 1 expired; fair b:held mine waiting 1 expired"},
		{"a dead place", "acquire a:held mine; dying b:held waiting 1; fair c:held waiting 2; gone:held waiting 1; release a:held released; fair c:held mine released; fair b:held waiting 1 released"},
		{"only dead places", "acquire a:held mine; dying b:held waiting 1; dying c:held waiting 2; gone:held waiting 1; gone:held; release a:free mine released"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := locked{t, b, c.name}
			tokens := map[string]dchannel.ID{"a": dchannel.NewID(), "b": dchannel.NewID(), "c": dchannel.NewID()}
			fences := []uint64{0} // by the number of the generation
			for i, step := range strings.Split(c.story, "; ") {
				act, want, _ := strings.Cut(step, ":")
				op, arg, _ := strings.Cut(act, " ")
				fence := uint64(12345)
				if n, err := strconv.Atoi(arg); err == nil && n < len(fences) {
					fence = fences[n]
				}
				var s dchannel.LockState
				switch op {
				case "acquire":
					s = l.try(tokens[arg])
				case "fair":
					s = l.lineUp(tokens[arg], time.Minute)
				case "short":
					s = l.acquire(dchannel.Lease{Token: tokens[arg], TTL: 300 * time.Millisecond})
				case "dying":
					s = l.lineUp(tokens[arg], time.Duration(200*(1+i))*time.Millisecond)
				case "extend":
					s = l.extend(tokens[arg], time.Minute)
				case "release":
					s = l.release(tokens[arg])
				case "end":
					s = l.end(fence, dchannel.LockForced)
				case "close":
					s = l.end(fence, dchannel.LockClosed)
				case "expire":
					s = l.expire()
				case "state":
					s = l.state()
				case "wait": // for the server's clock alone: nothing looks at the lock
					until, err := f.admin.HGet(ctxFor(t), "{dchannel/0}:l:"+c.name, "until").Int64()
					require.NoError(t, err)
					eventually(t, "the time is over", func() bool {
						now, err := f.admin.Time(ctxFor(t)).Result()
						return err == nil && now.UnixMicro() >= until
					})
					continue
				case "gone":
					before := l.state().Waiting
					eventually(t, "a place is lost", func() bool { s = l.state(); return s.Waiting < before })
				default:
					t.Fatal(step)
				}
				if s.Fence > fences[len(fences)-1] {
					fences = append(fences, s.Fence)
				}
				require.Equal(t, want, describe(s), "step %d, %s", i, act)
			}
		})
	}
}

func describe(s dchannel.LockState) string {
	words := []string{"free"}
	if s.Held {
		words[0] = "held"
	}
	if s.Mine {
		words = append(words, "mine")
	}
	if s.Waiting > 0 {
		words = append(words, fmt.Sprint("waiting ", s.Waiting))
	}
	for _, e := range s.Ended {
		words = append(words, e.Outcome.String())
	}
	return strings.Join(words, " ")
}

func TestLockTellsItsHolder(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	l := locked{t, f.backend(), "c"}
	for _, info := range []string{"", "host 7, pid 8", "two\nlines\x00and \"more\"", "日本語", strings.Repeat("i", dchannel.MaxLockInfo)} {
		one, two := dchannel.NewID(), dchannel.NewID()
		require.Equal(t, info, l.acquire(dchannel.Lease{Token: one, TTL: time.Minute, Info: info}).Info)
		require.Equal(t, info, l.acquire(dchannel.Lease{Token: two, TTL: time.Hour, Info: "2" + info, Fair: true}).Info)
		require.Equal(t, time.Minute, l.state().TTL)
		require.Equal(t, "2"+info, l.release(one).Info, "handed over with what was asked for")
		require.Equal(t, time.Hour, l.state().TTL)
		require.Equal(t, "2"+info, l.release(two).Info)
	}
	require.Len(t, l.state().Ended, 8)
}

func TestLockTimesAreRoundedUp(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend()
	for i, c := range []struct{ ttl, want time.Duration }{
		{0, time.Millisecond},
		{-time.Second, time.Millisecond},
		{1, time.Millisecond},
		{time.Second, time.Second},
		{time.Second + 1, time.Second + time.Millisecond},
		{1500*time.Millisecond - 1, 1500 * time.Millisecond},
		{30 * 24 * time.Hour, 30 * 24 * time.Hour},
		{math.MaxInt64, 100 * 365 * 24 * time.Hour},
	} {
		l := locked{t, b, fmt.Sprint(i)}
		token := dchannel.NewID()
		require.Equal(t, c.want, l.acquire(dchannel.Lease{Token: token, TTL: c.ttl}).TTL)
		if c.want > time.Millisecond {
			require.Equal(t, time.Hour, l.extend(token, time.Hour).TTL)
			require.Equal(t, c.want, l.extend(token, c.ttl).TTL)
		}
	}
}

// Remaining is compared with the record itself and the server's clock around the call.
func TestRemainingIsExact(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	l := locked{t, f.backend(), "c"}
	ctx := ctxFor(t)
	clock := func() int64 {
		now, err := f.admin.Time(ctx).Result()
		require.NoError(t, err)
		return now.UnixMicro()
	}
	token := dchannel.NewID()
	before := clock()
	require.Equal(t, 200*time.Millisecond, l.acquire(dchannel.Lease{Token: token, TTL: 200 * time.Millisecond}).Remaining)
	after := clock()
	until, err := f.admin.HGet(ctx, "{dchannel/0}:l:c", "until").Int64()
	require.NoError(t, err)
	require.GreaterOrEqual(t, until, before+200_000)
	require.LessOrEqual(t, until, after+200_000)
	for n := 0; ; n++ {
		before := clock()
		s := l.state()
		after := clock()
		up := func(us int64) time.Duration { return time.Duration(max(us+999, 0)/1000) * time.Millisecond }
		require.LessOrEqual(t, s.Remaining, up(until-before))
		require.GreaterOrEqual(t, s.Remaining, up(until-after))
		if !s.Held {
			require.GreaterOrEqual(t, after, until)
			t.Logf("%d reads of 200 ms", n)
			return
		}
		require.Less(t, before, until)
	}
}

func TestLockOfAClosedChannel(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	l := locked{t, f.backend(), "c"}
	ctx := ctxFor(t)
	one, two := dchannel.NewID(), dchannel.NewID()
	s := l.try(one)
	l.lineUp(two, time.Minute)
	_, err := l.b.MarkClosed(ctx, "c", dchannel.NewID(), time.Minute)
	require.NoError(t, err)
	for _, token := range []dchannel.ID{one, two, dchannel.NewID()} {
		for _, fair := range []bool{false, true} {
			got, err := l.b.Acquire(ctx, "c", dchannel.Lease{Token: token, TTL: time.Minute, Fair: fair})
			require.ErrorIs(t, err, dchannel.ErrChanClosed)
			require.Zero(t, got)
		}
	}
	require.Zero(t, l.state().Waiting)
	require.Equal(t, "free closed", describe(l.end(s.Fence, dchannel.LockClosed)))

	// A lock that ends after the log passes to nobody.
	l.channel = "d"
	l.try(one)
	l.lineUp(two, time.Minute)
	_, err = l.b.MarkClosed(ctx, "d", dchannel.NewID(), time.Minute)
	require.NoError(t, err)
	require.Equal(t, "free mine waiting 1 released", describe(l.release(one)))

	// A log that goes on is no obstacle.
	publish(t, l.b, "e", "x")
	l.channel = "e"
	require.Equal(t, "held mine", describe(l.try(dchannel.NewID())))
}

// What the script does is compared with a model of the comments, over random steps.
func TestLockModel(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	l := locked{t, f.backend(), "c"}
	ctx := ctxFor(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	var tokens [6]dchannel.ID
	for i := range tokens {
		tokens[i] = dchannel.NewID()
	}
	var (
		generations []dchannel.ID // the tokens
		held        bool
		line        []dchannel.ID
		ended       []dchannel.LockOutcome
	)
	drop := func(token dchannel.ID) {
		line = slices.DeleteFunc(line, func(w dchannel.ID) bool { return w == token })
	}
	end := func(how dchannel.LockOutcome) {
		held, ended = false, append([]dchannel.LockOutcome{how}, ended...)
		if len(line) > 0 {
			generations, held, line = append(generations, line[0]), true, line[1:]
		}
	}
	var last dchannel.LockState
	for n := range 3000 {
		i := r.IntN(len(tokens))
		token := tokens[i]
		newest := len(generations) > 0 && generations[len(generations)-1] == token
		known := 8 // that have ended
		if held {
			known++
		}
		used := slices.Contains(generations[max(len(generations)-known, 0):], token)
		var s dchannel.LockState
		var op string
		switch r.IntN(9) {
		case 0, 1:
			op, s = "acquire", l.try(token)
			if !used && !held {
				generations, held = append(generations, token), true
			}
		case 2, 3, 4:
			op, s = "line up", l.lineUp(token, time.Minute)
			if !used && !held {
				generations, held = append(generations, token), true
			} else if !used && !slices.Contains(line, token) {
				line = append(line, token)
			}
		case 5:
			op, s = "extend", l.extend(token, time.Minute)
		case 6:
			op, s = "release", l.release(token)
			if held && newest {
				end(dchannel.LockReleased)
			} else {
				drop(token)
			}
		case 7:
			op, s = "end", l.end(last.Fence, dchannel.LockForced)
			if held {
				end(dchannel.LockForced)
			}
		case 8: // the deadline is now
			if held {
				require.NoError(t, f.admin.HSet(ctx, "{dchannel/0}:l:c", "until", 1).Err())
				end(dchannel.LockExpired)
			}
			op, s = "state", l.state()
		}
		if used && r.IntN(2) == 0 { // the next attempt
			tokens[i] = dchannel.NewID()
		}
		want := dchannel.LockState{Held: held, Waiting: len(line)}
		for _, o := range ended[:min(len(ended), 8)] {
			want.Ended = append(want.Ended, dchannel.LockEnd{Outcome: o})
		}
		want.Mine = len(generations) > 0 && generations[len(generations)-1] == token && op != "end" && op != "state"
		require.Equal(t, describe(want), describe(s), "step %d, %s", n, op)
		require.GreaterOrEqual(t, s.Fence, last.Fence)
		last = s
	}
}

func TestLockIsExclusive(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	const contenders, rounds = 8, 100
	var mu sync.Mutex
	holders, fences := 0, []uint64{}
	var wg sync.WaitGroup
	for i := range contenders {
		l := locked{t, f.backend(), "c"}
		wg.Go(func() {
			for n := 0; n < rounds; {
				token := dchannel.NewID()
				s, err := l.b.Acquire(context.Background(), "c", dchannel.Lease{Token: token, TTL: time.Minute, Fair: i%2 == 0})
				for err == nil && i%2 == 0 && !s.Mine {
					s, err = l.b.Acquire(context.Background(), "c", dchannel.Lease{Token: token, TTL: time.Minute, Fair: true})
				}
				if err != nil {
					t.Error(err)
					return
				}
				if !s.Mine || !s.Held {
					continue
				}
				n++
				mu.Lock()
				holders++
				if holders != 1 || (len(fences) > 0 && fences[len(fences)-1] >= s.Fence) {
					t.Errorf("%d holders, fence %d", holders, s.Fence)
				}
				fences = append(fences, s.Fence)
				holders--
				mu.Unlock()
				if _, err := l.b.Release(context.Background(), "c", token); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	require.Len(t, fences, contenders*rounds)
}

func TestLockKeysExpire(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend()
	ctx := ctxFor(t)
	ttl := func(key string) time.Duration {
		d, err := f.admin.PTTL(ctx, key).Result()
		require.NoError(t, err)
		return d
	}
	for _, c := range []struct{ hold, wait time.Duration }{{time.Second, time.Hour}, {72 * time.Hour, time.Second}, {time.Second, 72 * time.Hour}} {
		l := locked{t, b, fmt.Sprint(c)}
		token := dchannel.NewID()
		l.acquire(dchannel.Lease{Token: token, TTL: c.hold})
		require.InDelta(t, 24*time.Hour+c.hold, ttl("{dchannel/0}:l:"+l.channel), float64(time.Minute))
		l.lineUp(dchannel.NewID(), c.wait)
		l.lineUp(dchannel.NewID(), c.wait)
		require.Greater(t, ttl("{dchannel/0}:l:"+l.channel), 24*time.Hour+max(c.hold, c.wait)-time.Minute)
		require.Greater(t, ttl("{dchannel/0}:w:"+l.channel), 24*time.Hour+c.wait-time.Minute)
		require.Greater(t, ttl("{dchannel/0}:t:"+l.channel), 24*time.Hour+c.wait-time.Minute)
		l.extend(token, 48*time.Hour)
		require.Greater(t, ttl("{dchannel/0}:l:"+l.channel), 71*time.Hour)
		l.release(token)
	}
	eternal(t, f.server)

	// A hash that was not there before, a line that is empty again.
	l := locked{t, b, "gone"}
	l.try(dchannel.NewID())
	waiter := dchannel.NewID()
	l.lineUp(waiter, time.Minute)
	l.release(waiter)
	n, err := f.admin.Exists(ctx, "{dchannel/0}:w:gone", "{dchannel/0}:t:gone").Result()
	require.NoError(t, err)
	require.Zero(t, n)
	fields, err := f.admin.HLen(ctx, "{dchannel/0}:l:gone").Result()
	require.NoError(t, err)
	require.EqualValues(t, 6, fields)
}
