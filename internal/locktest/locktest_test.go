package locktest_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
	"github.com/dchannel/dchannel/internal/locktest"
)

var config = locktest.Config{Channels: 8, Clients: 5, For: 10 * time.Second}

// run checks memory backends behind wrap, in fake time.
func run(t *testing.T, wrap func(b *memory.Backend) dchannel.Backend, check func(t *testing.T, connect func() dchannel.Backend)) {
	synctest.Test(t, func(t *testing.T) {
		s := memory.NewStore()
		check(t, func() dchannel.Backend { return wrap(s.Backend()) })
	})
}

func TestTheMemoryBackendIsALock(t *testing.T) {
	run(t, func(b *memory.Backend) dchannel.Backend { return slow{b} }, func(t *testing.T, connect func() dchannel.Backend) {
		r := locktest.Check(t, connect, config)
		require.Greater(t, r.Operations, 1000)
		require.Greater(t, r.Expiries, 50)
	})
}

// TestBugsAreFound shows that the check has teeth.
func TestBugsAreFound(t *testing.T) {
	for _, c := range []struct {
		bug  string
		wrap func(lk slow) dchannel.Backend
	}{
		{"release does not look at the token", func(lk slow) dchannel.Backend { return anyToken{lk} }},
		{"the TTL is too short", func(lk slow) dchannel.Backend { return scaled{lk, 1, 2} }},
		{"the TTL is a little too short", func(lk slow) dchannel.Backend { return scaled{lk, 9, 10} }},
		{"the TTL is too long", func(lk slow) dchannel.Backend { return scaled{lk, 3, 2} }},
		{"the fence has a TTL", func(lk slow) dchannel.Backend { return forgetful{lk} }},
		{"look, then lock", func(lk slow) dchannel.Backend { return twoSteps{lk} }},
		{"reads are old", func(lk slow) dchannel.Backend { return &cached{slow: lk, of: map[string]cachedState{}} }},
		{"an extension sets no deadline", func(lk slow) dchannel.Backend { return idleExtend{lk} }},
	} {
		t.Run(c.bug, func(t *testing.T) {
			run(t, func(b *memory.Backend) dchannel.Backend { return c.wrap(slow{b}) }, func(t *testing.T, connect func() dchannel.Backend) {
				r := locktest.Run(t.Context(), connect, config)
				t.Log(r)
				require.NotEmpty(t, r.Broken)
			})
		})
	}
}

// slow is a memory backend some way off.
type slow struct{ *memory.Backend }

func (s slow) Acquire(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
	time.Sleep(time.Millisecond)
	st, err := s.Backend.Acquire(ctx, channel, l)
	time.Sleep(time.Millisecond)
	return st, err
}

func (s slow) Release(ctx context.Context, channel string, token dchannel.ID) (dchannel.LockState, error) {
	time.Sleep(time.Millisecond)
	st, err := s.Backend.Release(ctx, channel, token)
	time.Sleep(time.Millisecond)
	return st, err
}

func (s slow) LockState(ctx context.Context, channel string) (dchannel.LockState, error) {
	time.Sleep(time.Millisecond)
	st, err := s.Backend.LockState(ctx, channel)
	time.Sleep(time.Millisecond)
	return st, err
}

type anyToken struct{ slow }

func (b anyToken) Release(ctx context.Context, channel string, token dchannel.ID) (dchannel.LockState, error) {
	st, err := b.slow.Release(ctx, channel, token)
	if err == nil && st.Held && !st.Mine {
		_, err = b.EndLock(ctx, channel, 0, dchannel.LockReleased)
	}
	return st, err
}

// scaled has locks live for by/per of what it says.
type scaled struct {
	slow
	by, per time.Duration
}

func (b scaled) Acquire(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
	asked := l.TTL
	l.TTL = l.TTL * b.by / b.per
	st, err := b.slow.Acquire(ctx, channel, l)
	if st.Mine {
		st.TTL, st.Remaining = asked, st.Remaining*b.per/b.by
	}
	return st, err
}

// forgetful counts fences from 1 again after every ten.
type forgetful struct{ slow }

var counters sync.Map

func (b forgetful) Acquire(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
	st, err := b.slow.Acquire(ctx, channel, l)
	st.Fence = renumber(channel, st.Fence)
	return st, err
}

func (b forgetful) LockState(ctx context.Context, channel string) (dchannel.LockState, error) {
	st, err := b.slow.LockState(ctx, channel)
	return renumbered(channel, st), err
}

func (b forgetful) Extend(ctx context.Context, channel string, token dchannel.ID, ttl time.Duration) (dchannel.LockState, error) {
	st, err := b.Backend.Extend(ctx, channel, token, ttl)
	return renumbered(channel, st), err
}

func (b forgetful) Release(ctx context.Context, channel string, token dchannel.ID) (dchannel.LockState, error) {
	st, err := b.slow.Release(ctx, channel, token)
	return renumbered(channel, st), err
}

type numbers struct {
	mu sync.Mutex
	of map[uint64]uint64
}

func renumber(channel string, fence uint64) uint64 {
	v, _ := counters.LoadOrStore(channel, &numbers{of: map[uint64]uint64{}})
	n := v.(*numbers)
	n.mu.Lock()
	defer n.mu.Unlock()
	if fence != 0 && n.of[fence] == 0 {
		n.of[fence] = uint64(len(n.of)%10) + 1
	}
	return n.of[fence]
}

func renumbered(channel string, st dchannel.LockState) dchannel.LockState {
	st.Fence = renumber(channel, st.Fence)
	ended := make([]dchannel.LockEnd, len(st.Ended))
	for i, e := range st.Ended {
		ended[i] = dchannel.LockEnd{Fence: renumber(channel, e.Fence), Outcome: e.Outcome}
	}
	st.Ended = ended
	return st
}

type twoSteps struct{ slow }

func (b twoSteps) Acquire(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
	st, err := b.slow.LockState(ctx, channel)
	if err != nil || st.Held {
		return st, err
	}
	if _, err = b.EndLock(ctx, channel, 0, dchannel.LockReleased); err != nil { // whoever came in between
		return st, err
	}
	return b.slow.Acquire(ctx, channel, l)
}

type cachedState struct {
	st dchannel.LockState
	at time.Time
}

type cached struct {
	slow
	mu sync.Mutex
	of map[string]cachedState
}

func (b *cached) LockState(ctx context.Context, channel string) (dchannel.LockState, error) {
	b.mu.Lock()
	old, ok := b.of[channel]
	b.mu.Unlock()
	if ok && time.Since(old.at) < 50*time.Millisecond {
		return old.st, nil
	}
	st, err := b.slow.LockState(ctx, channel)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.of[channel] = cachedState{st, time.Now()}
	return st, err
}

type idleExtend struct{ slow }

func (b idleExtend) Extend(ctx context.Context, channel string, token dchannel.ID, ttl time.Duration) (dchannel.LockState, error) {
	st, err := b.LockState(ctx, channel)
	if st.Held && st.Token == token {
		st.Mine, st.TTL, st.Remaining = true, ttl, ttl
	}
	return st, err
}
