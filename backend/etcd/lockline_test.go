package etcd_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/etcd"
)

func lineUp(t testing.TB, b *etcd.Backend, channel string, token dchannel.ID, ttl time.Duration) dchannel.LockState {
	s, err := b.Acquire(t.Context(), channel, dchannel.Lease{Token: token, TTL: ttl, Fair: true})
	require.NoError(t, err)
	return s
}

func TestLine(t *testing.T) {
	url := server(t).URL()
	holder := backend(t, connect(t, url))
	token := dchannel.NewID()
	last := lineUp(t, holder, "a", token, hour)
	require.True(t, last.Held && last.Mine)
	var waiters []*etcd.Backend
	var tokens []dchannel.ID
	for i := range 4 {
		waiters, tokens = append(waiters, backend(t, connect(t, url))), append(tokens, dchannel.NewID())
		for range 2 {
			s := lineUp(t, waiters[i], "a", tokens[i], time.Duration(i+1)*time.Minute)
			require.True(t, s.Held && !s.Mine)
			require.Equal(t, last.Fence, s.Fence)
			require.Equal(t, i+1, s.Waiting)
		}
	}
	// The third goes; it is not the holder.
	s, err := waiters[2].Release(t.Context(), "a", tokens[2])
	require.NoError(t, err)
	require.True(t, s.Held && !s.Mine && s.Waiting == 3)
	for _, i := range []int{0, 1, 3} {
		require.False(t, acquire(t, holder, "a", dchannel.NewID(), hour).Mine, "not past the line")
		hints := make(chan struct{}, 1)
		w, err := waiters[i].WatchLock(t.Context(), "a", hinted(hints))
		require.NoError(t, err)
		if i == 1 {
			s, err = holder.EndLock(t.Context(), "a", last.Fence, dchannel.LockForced)
		} else {
			s, err = holder.Release(t.Context(), "a", token)
		}
		require.NoError(t, err)
		require.True(t, s.Held && !s.Mine && s.Fence > last.Fence, "it has passed to the next in the same step: %+v", s)
		ttl := time.Duration(i+1) * time.Minute
		require.Equal(t, ttl, s.Remaining)
		select {
		case <-hints:
		case <-time.After(patience):
			require.FailNow(t, "no hint")
		}
		mine := lineUp(t, waiters[i], "a", tokens[i], ttl)
		require.True(t, mine.Held && mine.Mine && mine.Fence == s.Fence && mine.TTL == ttl)
		last, token = mine, tokens[i]
		w.Close()
	}
	s, err = holder.Release(t.Context(), "a", token)
	require.NoError(t, err)
	require.True(t, !s.Held && s.Mine && s.Waiting == 0)

	// A channel that is closed passes to nobody.
	for _, how := range []dchannel.LockOutcome{dchannel.LockReleased, dchannel.LockClosed} {
		name := how.String()
		a, z := dchannel.NewID(), dchannel.NewID()
		lineUp(t, holder, name, a, hour)
		lineUp(t, waiters[0], name, z, hour)
		_, err = holder.MarkClosed(t.Context(), name, dchannel.NewID(), hour)
		require.NoError(t, err)
		if how == dchannel.LockReleased {
			s, err = holder.Release(t.Context(), name, a)
		} else {
			s, err = holder.EndLock(t.Context(), name, 0, how)
		}
		require.NoError(t, err)
		require.True(t, !s.Held && ends(s, how))
		_, err = waiters[0].Acquire(t.Context(), name, dchannel.Lease{Token: z, TTL: hour, Fair: true})
		require.ErrorIs(t, err, dchannel.ErrChanClosed)
	}
}

// A place is lost with its time, whether the lock is held then or free.
func TestDeadPlaces(t *testing.T) {
	url := server(t).URL()
	b := backend(t, connect(t, url))
	holder, dead, alive := dchannel.NewID(), dchannel.NewID(), dchannel.NewID()
	acquire(t, b, "a", holder, 2*time.Second)
	require.Equal(t, 1, lineUp(t, b, "a", dead, 5*time.Second).Waiting)
	hints := make(chan struct{}, 1)
	w, err := b.WatchLock(t.Context(), "a", hinted(hints))
	require.NoError(t, err)
	defer w.Close()
	began, free := time.Now(), time.Time{}
	for {
		s := lineUp(t, b, "a", alive, 4*time.Second)
		if s.Mine {
			require.True(t, s.Held && ends(s, dchannel.LockExpired))
			require.Zero(t, s.Waiting)
			break
		}
		if !s.Held && free.IsZero() {
			free = time.Now()
			require.Equal(t, 2, s.Waiting)
			stranger := acquire(t, b, "a", dchannel.NewID(), hour)
			require.True(t, !stranger.Held && !stranger.Mine, "it belongs to the first in line")
		}
		select {
		case <-hints:
		case <-time.After(time.Second): // keeps the place
		}
		require.Less(t, time.Since(began), patience)
	}
	require.False(t, free.IsZero())
	t.Logf("free after %v, claimed past a dead place of 5s after %v", free.Sub(began), time.Since(began))
	// The dead one comes back: a place at the end.
	s := lineUp(t, b, "a", dead, time.Minute)
	require.True(t, s.Held && !s.Mine && s.Waiting == 1)
}
