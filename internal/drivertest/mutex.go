package drivertest

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/dmutex"
)

// Mutex has several processes count under one dmutex, look at it, and refresh a value
// that only one of them may refresh.
func Mutex(t *testing.T, rig Rig) {
	ctx, done := context.WithTimeout(t.Context(), time.Minute)
	defer done()
	const processes, turns, ttl = 4, 10, 10 * time.Second
	var mutexes []*dmutex.Mutex
	for range processes {
		m := dmutex.New("counter", ttl, rig.Connect(t, rig.Server.Addr()), dmutex.WithAutoExtend(), dmutex.WithInfo("a test"))
		mutexes = append(mutexes, m)
	}
	var fence, inside atomic.Uint64
	count := 0 // by nothing but the mutex
	var wg sync.WaitGroup
	for _, m := range mutexes {
		for range 2 {
			wg.Go(func() {
				for range turns {
					if !assert.NoError(t, m.LockContext(ctx)) {
						return
					}
					assert.EqualValues(t, 1, inside.Add(1))
					assert.Less(t, fence.Swap(m.Fence()), m.Fence())
					count++
					inside.Add(^uint64(0))
					assert.NoError(t, m.UnlockContext(ctx))
				}
			})
		}
	}
	wg.Wait()
	require.Equal(t, processes*2*turns, count)

	require.NoError(t, mutexes[0].TryLock())
	var failed *dmutex.ErrFailedToLock
	err := mutexes[1].TryLock()
	require.ErrorAs(t, err, &failed)
	require.ErrorIs(t, err, dchannel.ErrLocked)
	left, err := mutexes[1].LockedUntil(ctx)
	require.NoError(t, err)
	require.Positive(t, left)
	holder, err := mutexes[1].Holder(ctx)
	require.NoError(t, err)
	require.Equal(t, "a test", holder.Info)
	woken := make(chan error, 1)
	go func() {
		expired, err := mutexes[1].WaitUntilUnlocked(ctx)
		if expired {
			err = errors.New("told that the time was over")
		}
		woken <- err
	}()
	require.NoError(t, mutexes[0].Unlock())
	require.NoError(t, <-woken)

	var refreshed, token atomic.Uint64
	for _, m := range mutexes {
		for range 5 {
			wg.Go(func() {
				v, err := dmutex.Do(ctx, m,
					func(context.Context) (uint64, bool, error) { v := token.Load(); return v, v != 0, nil },
					func(_ context.Context, fence uint64) (uint64, error) {
						refreshed.Add(1)
						token.Store(fence)
						return fence, nil
					})
				assert.NoError(t, err)
				assert.NotZero(t, v)
			})
		}
	}
	wg.Wait()
	require.EqualValues(t, 1, refreshed.Load())
	for _, m := range mutexes {
		require.NoError(t, m.Close())
	}
	t.Logf("dmutex: %d processes counted to %d, fences grew; %d callers of Do, %d refresh", processes, count, processes*5, refreshed.Load())
}
