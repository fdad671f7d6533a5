package redis_test

import (
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/testserver"
)

func TestLineIsFirstComeFirstServed(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	l := locked{t, f.backend(), "c"}
	other := locked{t, f.backend(), "c"}
	const n = 20
	tokens := make([]dchannel.ID, n)
	holder := dchannel.NewID()
	l.try(holder)
	for i := range tokens {
		tokens[i] = dchannel.NewID()
		ttl := time.Minute
		if i%3 == 2 {
			ttl = 200 * time.Millisecond // and never comes again
		}
		s := l.acquire(dchannel.Lease{Token: tokens[i], TTL: ttl, Fair: true, Info: fmt.Sprint(i)})
		require.False(t, s.Mine)
	}
	dead := n / 3
	eventually(t, "the dead places are lost", func() bool { return l.state().Waiting == n-dead })
	var order []string
	var fence uint64
	for s := other.release(holder); s.Held; {
		require.Greater(t, s.Fence, fence)
		fence = s.Fence
		order = append(order, s.Info)
		i, err := strconv.Atoi(s.Info)
		require.NoError(t, err)
		again := other.lineUp(tokens[i], time.Minute)
		require.True(t, again.Mine && again.Held)
		require.Equal(t, n-dead-len(order), again.Waiting)
		switch i % 2 {
		case 0:
			s = l.release(tokens[i])
		case 1:
			s = l.end(fence, dchannel.LockForced)
		}
	}
	require.Equal(t, []string{"0", "1", "3", "4", "6", "7", "9", "10", "12", "13", "15", "16", "18", "19"}, order)
	require.Zero(t, l.state().Waiting)
}

// Holders that are gone do not stop the line: whoever calls next hands over.
func TestLineMovesOnOverExpiry(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	l := locked{t, f.backend(), "c"}
	const n = 20
	holder := dchannel.NewID()
	l.try(holder)
	fences := make([]uint64, n)
	var wg sync.WaitGroup
	for i := range n {
		lease := dchannel.Lease{Token: dchannel.NewID(), TTL: within, Fair: true}
		s := l.acquire(lease)
		require.Equal(t, i+1, s.Waiting)
		wg.Go(func() { // a waiter as the core is one, but without hints
			for !s.Mine {
				select {
				case <-time.After(min(s.Remaining, 10*time.Millisecond)):
				case <-t.Context().Done():
					return
				}
				var err error
				if s, err = l.b.Acquire(t.Context(), "c", lease); err != nil {
					t.Error(err)
					return
				}
			}
			fences[i] = s.Fence
			if _, err := l.b.Extend(t.Context(), "c", lease.Token, time.Millisecond); err != nil {
				t.Error(err)
			}
		})
	}
	l.extend(holder, time.Millisecond)
	wg.Wait()
	require.True(t, slices.IsSorted(fences) && fences[0] > 0, "%v", fences)
	for _, e := range l.expire().Ended {
		require.Equal(t, dchannel.LockExpired, e.Outcome)
	}
}

// A Release that follows an Acquire without an answer can be executed before it. A lock
// in the name of nobody, for a whole TTL, must not come of that.
func TestReleaseOvertakesAcquire(t *testing.T) {
	for _, fair := range []bool{false, true} {
		t.Run(fmt.Sprint("fair ", fair), func(t *testing.T) {
			f := newFixture(t, testserver.RedisConfig{})
			l := locked{t, f.backend(), "c"}
			direct := locked{t, f.backend(), "c"}
			holder := dchannel.NewID()
			if fair {
				direct.try(holder)
			}
			require.Zero(t, l.state().Waiting) // there is a connection, and the script is known
			f.proxy.Delay(500 * time.Millisecond)
			token := dchannel.NewID()
			ctx, cancel := shortly(50 * time.Millisecond)
			defer cancel()
			_, err := l.b.Acquire(ctx, "c", dchannel.Lease{Token: token, TTL: time.Minute, Fair: fair})
			require.ErrorIs(t, err, dchannel.ErrUncertain)
			f.proxy.Delay(0)
			before := f.info("commandstats", "cmdstat_evalsha")
			s := l.release(token)
			require.Equal(t, fair, s.Held)
			released := f.info("commandstats", "cmdstat_evalsha")
			require.NotEqual(t, before, released, "released")
			eventually(t, "the late attempt arrives", func() bool { return f.info("commandstats", "cmdstat_evalsha") != released })
			s = direct.state()
			require.Equal(t, fair, s.Held)
			require.Zero(t, s.Waiting)
			if fair {
				require.False(t, direct.release(holder).Held)
			}
			require.True(t, direct.try(dchannel.NewID()).Mine)
			eternal(t, f.server)
		})
	}
}
