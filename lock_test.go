package dchannel_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
)

// bubble runs f in fake time.
func bubble(t *testing.T, f func(t *testing.T, s *memory.Store)) {
	synctest.Test(t, func(t *testing.T) { f(t, memory.NewStore()) })
}

// process returns a handle of one more process.
func process(t *testing.T, s *memory.Store, opts ...dchannel.Option) *dchannel.Channel {
	b := s.Backend()
	ch := dchannel.New("x", b, opts...)
	t.Cleanup(func() {
		_ = ch.Detach()
		assert.NoError(t, b.Close())
	})
	return ch
}

func TestALockIsHeldByOneAndToldToOthers(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		a, b := process(t, s), process(t, s)
		ctx := t.Context()
		left, err := a.LockedUntil(ctx)
		require.NoError(t, err)
		require.Zero(t, left)

		hold, err := a.LockFor(ctx, time.Minute, dchannel.WithLockInfo("a"))
		require.NoError(t, err)
		require.Equal(t, time.Minute, hold.TTL())
		require.Equal(t, time.Minute-600*time.Millisecond, hold.Remaining())

		time.Sleep(10 * time.Second)
		for _, ch := range []*dchannel.Channel{a, b} {
			_, err = ch.LockFor(ctx, time.Second)
			var locked *dchannel.LockedError
			require.ErrorIs(t, err, dchannel.ErrLocked)
			require.ErrorAs(t, err, &locked)
			require.Equal(t, dchannel.LockedError{Channel: "x", Fence: hold.Fence(), Remaining: 50 * time.Second, Info: "a"}, *locked)
			left, err = ch.LockedUntil(ctx)
			require.NoError(t, err)
			require.Equal(t, 50*time.Second, left)
			st, err := ch.LockStatus(ctx)
			require.NoError(t, err)
			require.True(t, st.Held)
			require.Equal(t, ch == a, st.Mine)
		}

		left, err = hold.Extend(ctx, 2*time.Minute)
		require.NoError(t, err)
		require.Equal(t, 2*time.Minute-1200*time.Millisecond, left)

		require.NoError(t, a.CloseLockedUntil())
		require.ErrorIs(t, context.Cause(hold.Context()), dchannel.ErrLockReleased)
		require.NoError(t, a.CloseLockedUntil())
		require.NoError(t, b.CloseLockedUntil())
		_, err = hold.Extend(ctx, time.Minute)
		require.ErrorIs(t, err, dchannel.ErrNotHeld)

		next, err := b.LockFor(ctx, time.Second)
		require.NoError(t, err)
		require.Greater(t, next.Fence(), hold.Fence())
		outcome, err := a.WaitFence(ctx, hold.Fence())
		require.NoError(t, err)
		require.Equal(t, dchannel.LockReleased, outcome)
		began := time.Now()
		outcome, err = a.WaitUnlocked(ctx)
		require.NoError(t, err)
		require.Equal(t, dchannel.LockExpired, outcome)
		require.Equal(t, time.Second+5*time.Millisecond, time.Since(began))
		outcome, err = a.WaitUnlocked(ctx)
		require.NoError(t, err)
		require.Equal(t, dchannel.LockNone, outcome)
	})
}

func TestAHoldEndsWithACause(t *testing.T) {
	for _, c := range []struct {
		what        string
		end         func(t *testing.T, s *memory.Store, a, b *dchannel.Channel, fence uint64)
		extend, say error
		outcome     dchannel.LockOutcome
	}{
		{"its time is over", func(*testing.T, *memory.Store, *dchannel.Channel, *dchannel.Channel, uint64) {
			time.Sleep(time.Minute)
		}, dchannel.ErrLockExpired, dchannel.ErrLockExpired, dchannel.LockExpired},
		{"expired early", func(_ *testing.T, s *memory.Store, _, _ *dchannel.Channel, _ uint64) {
			s.ExpireLock("x")
		}, dchannel.ErrLockExpired, dchannel.ErrLockExpired, dchannel.LockExpired},
		{"forced", func(t *testing.T, _ *memory.Store, _, b *dchannel.Channel, fence uint64) {
			require.ErrorIs(t, b.ForceUnlock(t.Context(), fence+1), dchannel.ErrNotHeld)
			require.NoError(t, b.ForceUnlock(t.Context(), fence))
		}, dchannel.ErrLockLost, dchannel.ErrLockLost, dchannel.LockForced},
		{"another's", func(t *testing.T, s *memory.Store, _, b *dchannel.Channel, _ uint64) {
			s.ExpireLock("x")
			_, err := b.LockFor(t.Context(), time.Minute)
			require.NoError(t, err)
		}, dchannel.ErrLockLost, dchannel.ErrLockLost, dchannel.LockExpired},
		{"closed", func(t *testing.T, _ *memory.Store, _, b *dchannel.Channel, _ uint64) {
			require.NoError(t, b.Close())
		}, dchannel.ErrLockLost, nil, dchannel.LockClosed},
		{"flushed", func(_ *testing.T, s *memory.Store, _, _ *dchannel.Channel, _ uint64) {
			s.LoseState()
		}, dchannel.ErrLockLost, dchannel.ErrLockLost, dchannel.LockSuperseded},
	} {
		t.Run(c.what, func(t *testing.T) {
			bubble(t, func(t *testing.T, s *memory.Store) {
				a, b, observer := process(t, s), process(t, s), process(t, s)
				ctx := t.Context()
				hold, err := a.LockFor(ctx, 10*time.Second)
				require.NoError(t, err)
				var wg sync.WaitGroup
				wg.Go(func() {
					o, err := observer.WaitUnlocked(ctx)
					assert.NoError(t, err)
					assert.Equal(t, c.outcome, o)
				})
				synctest.Wait()
				c.end(t, s, a, b, hold.Fence())
				wg.Wait()
				o, err := observer.WaitFence(ctx, hold.Fence())
				require.NoError(t, err)
				require.Equal(t, c.outcome, o)

				_, err = hold.Extend(ctx, time.Second)
				require.ErrorIs(t, err, c.extend)
				require.ErrorIs(t, err, dchannel.ErrNotHeld)
				require.ErrorIs(t, context.Cause(hold.Context()), c.extend)
				require.Zero(t, hold.Remaining())
				require.ErrorIs(t, a.CloseLockedUntil(), c.say)
				require.NoError(t, a.CloseLockedUntil())
			})
		})
	}
}

func TestAutoExtendKeepsALock(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		a, b := process(t, s), process(t, s)
		hold, err := a.LockFor(t.Context(), 3*time.Second, dchannel.WithAutoExtend())
		require.NoError(t, err)
		for range 100 {
			time.Sleep(time.Second)
			_, err := b.LockFor(t.Context(), time.Second)
			require.ErrorIs(t, err, dchannel.ErrLocked)
			require.NoError(t, hold.Context().Err())
		}
		s.Pause() // a failed renewal is no loss before the deadline
		time.Sleep(1500 * time.Millisecond)
		require.NoError(t, hold.Context().Err())
		s.Resume()
		time.Sleep(10 * time.Second)
		require.NoError(t, hold.Context().Err())
		require.NoError(t, b.ForceUnlock(t.Context(), 0))
		<-hold.Context().Done()
		require.ErrorIs(t, context.Cause(hold.Context()), dchannel.ErrLockLost)
		require.ErrorIs(t, a.CloseLockedUntil(), dchannel.ErrLockLost)
		require.ErrorIs(t, b.ForceUnlock(t.Context(), 0), dchannel.ErrNotHeld)
	})
}

func TestWhoWaitsForALockGetsIt(t *testing.T) {
	for _, fair := range []bool{false, true} {
		bubble(t, func(t *testing.T, s *memory.Store) {
			var inside, turns atomic.Int64
			var mu sync.Mutex
			last := uint64(0)
			var wg sync.WaitGroup
			opts := []dchannel.LockOption{dchannel.WithWait()}
			if fair {
				opts = append(opts, dchannel.WithFair())
			}
			for range 10 {
				b := s.Backend()
				for range 20 {
					ch := dchannel.New("x", b)
					wg.Go(func() {
						hold, err := ch.LockFor(t.Context(), time.Minute, opts...)
						if !assert.NoError(t, err) {
							return
						}
						assert.Equal(t, int64(1), inside.Add(1))
						mu.Lock()
						assert.Greater(t, hold.Fence(), last)
						last = hold.Fence()
						mu.Unlock()
						time.Sleep(time.Millisecond)
						inside.Add(-1)
						turns.Add(1)
						assert.NoError(t, ch.CloseLockedUntil())
						assert.NoError(t, ch.Detach())
					})
				}
			}
			began := time.Now()
			wg.Wait()
			assert.Equal(t, int64(200), turns.Load())
			t.Logf("fair %v: 200 turns in %v", fair, time.Since(began))
			synctest.Wait()
			assert.Zero(t, s.LockWatches("x"))
		})
	}
}

func TestLockForSaysWhatCannotBe(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		a := process(t, s)
		ctx := t.Context()
		for _, ttl := range []time.Duration{0, -1, dchannel.MaxLockTTL + 1} {
			_, err := a.LockFor(ctx, ttl)
			require.ErrorIs(t, err, dchannel.ErrInvalidOption)
			require.ErrorContains(t, err, ttl.String())
		}
		_, err := a.LockFor(ctx, 1, dchannel.WithLockInfo(string(make([]byte, 256))))
		require.ErrorIs(t, err, dchannel.ErrInvalidOption)
		require.ErrorContains(t, err, "256 bytes, want at most 255")

		bare := dchannel.New("x", struct{ dchannel.Backend }{s.Backend()})
		_, err = bare.LockFor(ctx, 1)
		require.ErrorIs(t, err, errors.ErrUnsupported)
		require.NoError(t, bare.CloseLockedUntil())

		require.NoError(t, a.Close())
		_, err = a.LockFor(ctx, time.Second)
		require.ErrorIs(t, err, dchannel.ErrChanClosed)
		_, err = process(t, s).LockFor(ctx, time.Second, dchannel.WithWait())
		require.ErrorIs(t, err, dchannel.ErrChanClosed)
	})
}
