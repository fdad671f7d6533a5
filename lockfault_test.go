package dchannel_test

import (
	"context"
	"runtime"
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

func TestALostReplyLeavesNoLock(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		b := s.Backend()
		a, other := dchannel.New("x", b), process(t, s)
		b.LoseReplies(3)
		hold, err := a.LockFor(t.Context(), time.Minute)
		require.NoError(t, err)
		b.LoseReplies(3)
		_, err = hold.Extend(t.Context(), 2*time.Minute)
		require.NoError(t, err)
		b.LoseReplies(3)
		require.NoError(t, a.CloseLockedUntil())

		b.LoseReplies(1 << 30)
		ctx, done := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer done()
		began := time.Now()
		_, err = a.LockFor(ctx, time.Hour)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, dchannel.ErrUncertain) // the release's reply is lost, too
		require.LessOrEqual(t, time.Since(began), 200*time.Millisecond)
		left, err := other.LockedUntil(t.Context())
		require.NoError(t, err)
		require.Zero(t, left)

		b.LoseReplies(0)
		s.Pause() // a request that is on its way, and done late
		ctx, done = context.WithTimeout(t.Context(), time.Second)
		defer done()
		_, err = a.LockFor(ctx, time.Hour)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, dchannel.ErrUncertain)
		s.Resume()
		left, err = other.LockedUntil(t.Context())
		require.NoError(t, err)
		require.Zero(t, left)
		require.NoError(t, a.Detach())
		time.Sleep(time.Minute) // releases that go on end
		require.NoError(t, b.Close())
	})
}

func TestLockCallsOverAnOutage(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		b := s.Backend()
		a, other := dchannel.New("x", b), process(t, s)
		b.Cut(nil)
		_, err := a.LockFor(t.Context(), time.Minute)
		require.ErrorIs(t, err, dchannel.ErrUnavailable)
		require.NotErrorIs(t, err, dchannel.ErrUncertain)
		time.AfterFunc(time.Second, b.Heal)
		_, err = a.LockFor(t.Context(), time.Minute)
		require.NoError(t, err)

		b.Cut(nil)
		began := time.Now()
		require.ErrorIs(t, a.CloseLockedUntil(), dchannel.ErrUnavailable)
		require.Equal(t, dchannel.DefaultTimeout, time.Since(began))
		b.Heal()
		require.NoError(t, a.CloseLockedUntil())

		// Waits go on over outages, and see what happened meanwhile.
		hold, err := other.LockFor(t.Context(), time.Hour)
		require.NoError(t, err)
		var wg sync.WaitGroup
		wg.Go(func() {
			o, err := a.WaitUnlocked(t.Context())
			assert.NoError(t, err)
			assert.Equal(t, dchannel.LockReleased, o)
		})
		wg.Go(func() {
			_, err := a.LockFor(t.Context(), time.Minute, dchannel.WithWait())
			assert.NoError(t, err)
		})
		synctest.Wait()
		b.Cut(nil)
		require.NoError(t, other.CloseLockedUntil())
		time.Sleep(time.Minute)
		b.Heal()
		wg.Wait()
		o, err := a.WaitFence(t.Context(), hold.Fence())
		require.NoError(t, err)
		require.Equal(t, dchannel.LockReleased, o)
		require.NoError(t, a.Detach())
		left, err := other.LockedUntil(t.Context())
		require.NoError(t, err)
		require.Zero(t, left, "Detach releases")
		require.NoError(t, b.Close())
	})
}

func TestWaitsEnd(t *testing.T) {
	for what, c := range map[string]struct {
		end  func(ch *dchannel.Channel, b *memory.Backend, cancel func())
		want error
	}{
		"with the context": {func(_ *dchannel.Channel, _ *memory.Backend, cancel func()) { cancel() }, context.Canceled},
		"with the handle":  {func(ch *dchannel.Channel, _ *memory.Backend, _ func()) { _ = ch.Detach() }, dchannel.ErrDetached},
		"with the backend": {func(_ *dchannel.Channel, b *memory.Backend, _ func()) { _ = b.Close() }, dchannel.ErrBackendClosed},
	} {
		t.Run(what, func(t *testing.T) {
			bubble(t, func(t *testing.T, s *memory.Store) {
				b := s.Backend()
				ch, holder := dchannel.New("x", b), process(t, s)
				_, err := holder.LockFor(t.Context(), time.Hour)
				require.NoError(t, err)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var wg sync.WaitGroup
				wg.Go(func() {
					_, err := ch.WaitUnlocked(ctx)
					assert.ErrorIs(t, err, c.want)
				})
				for _, o := range [][]dchannel.LockOption{{}, {dchannel.WithFair()}} {
					wg.Go(func() {
						_, err := ch.LockFor(ctx, time.Minute, append(o, dchannel.WithWait())...)
						assert.ErrorIs(t, err, c.want)
					})
				}
				synctest.Wait()
				began := time.Now()
				c.end(ch, b, cancel)
				wg.Wait()
				assert.LessOrEqual(t, time.Since(began), 100*time.Millisecond)
				_ = ch.Detach()
				_ = b.Close()
				st, err := holder.LockStatus(t.Context())
				require.NoError(t, err)
				if c.want != dchannel.ErrBackendClosed { //nolint:errorlint // this very value
					require.Zero(t, st.Waiting)
				}
				synctest.Wait()
				require.Zero(t, s.LockWatches("x"))
			})
		})
	}
}

// counted counts what reaches the server, which is a millisecond away.
type counted struct {
	*memory.Backend
	acquires, reads *atomic.Int64
}

func (b counted) Acquire(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
	b.acquires.Add(1)
	time.Sleep(500 * time.Microsecond)
	defer time.Sleep(500 * time.Microsecond)
	return b.Backend.Acquire(ctx, channel, l)
}

func (b counted) LockState(ctx context.Context, channel string) (dchannel.LockState, error) {
	b.reads.Add(1)
	time.Sleep(500 * time.Microsecond)
	defer time.Sleep(500 * time.Microsecond)
	return b.Backend.LockState(ctx, channel)
}

// anonymous does not tell whose the lock is.
type anonymous struct{ counted }

func (b anonymous) LockState(ctx context.Context, channel string) (dchannel.LockState, error) {
	st, err := b.counted.LockState(ctx, channel)
	st.Token = dchannel.ID{}
	return st, err
}

func TestContendersAskSeldom(t *testing.T) {
	for _, c := range []struct {
		what string
		opts []dchannel.LockOption
		wrap func(b counted) dchannel.Backend
		most float64
	}{
		{"default", nil, func(b counted) dchannel.Backend { return b }, 10},
		{"fair", []dchannel.LockOption{dchannel.WithFair()}, func(b counted) dchannel.Backend { return b }, 1.1},
		{"fair, on a backend that does not tell tokens", []dchannel.LockOption{dchannel.WithFair()},
			func(b counted) dchannel.Backend { return anonymous{b} }, 200},
	} {
		bubble(t, func(t *testing.T, s *memory.Store) {
			var acquires, reads atomic.Int64
			var wg sync.WaitGroup
			began := time.Now()
			var last time.Duration
			for range 10 {
				b := c.wrap(counted{s.Backend(), &acquires, &reads})
				for range 20 {
					ch := dchannel.New("x", b)
					wg.Go(func() {
						_, err := ch.LockFor(t.Context(), time.Minute, append(c.opts, dchannel.WithWait())...)
						assert.NoError(t, err)
						time.Sleep(time.Millisecond)
						last = time.Since(began) // under the lock
						assert.NoError(t, ch.CloseLockedUntil())
						assert.NoError(t, ch.Detach())
					})
				}
			}
			wg.Wait()
			each := float64(acquires.Load()) / 200
			t.Logf("%s: %.2f tries and %.2f reads for each of 200 turns, in %v", c.what, each, float64(reads.Load())/200, last)
			assert.LessOrEqual(t, each, c.most)
		})
	}
}

// TestHeldLocksCostNoGoroutine shows that only auto-extension has one.
func TestHeldLocksCostNoGoroutine(t *testing.T) {
	bubble(t, func(t *testing.T, s *memory.Store) {
		before := runtime.NumGoroutine()
		for range 100 {
			b := s.Backend()
			ch := dchannel.New(dchannel.NewID().String(), b)
			_, err := ch.LockFor(t.Context(), time.Hour)
			require.NoError(t, err)
		}
		synctest.Wait()
		require.LessOrEqual(t, runtime.NumGoroutine(), before+2)
		time.Sleep(2 * time.Hour)
	})
}
