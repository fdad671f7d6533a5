package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/etcd"
	"github.com/dchannel/dchannel/internal/faultproxy"
	"github.com/dchannel/dchannel/internal/testserver"
)

func proxied(t testing.TB, s *testserver.Server) (*faultproxy.Proxy, *clientv3.Client) {
	p, err := faultproxy.New(s.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	return p, connect(t, p.Addr())
}

// persistently publishes f as the core does: again with its age until it is decided.
func persistently(t testing.TB, b *etcd.Backend, channel string, f dchannel.Frame) (dchannel.Position, error) {
	began := time.Now().Add(-f.Age)
	for {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		pos, err := b.Publish(ctx, channel, f)
		cancel()
		if err == nil || !errors.Is(err, dchannel.ErrUnavailable) && !errors.Is(err, dchannel.ErrUncertain) {
			return pos, err
		}
		if time.Since(began) > patience {
			return pos, err
		}
		f.Age = time.Since(began)
	}
}

func TestRetryAfterALostReply(t *testing.T) {
	s := server(t)
	proxy, c := proxied(t, s)
	b, other := backend(t, c), backend(t, connect(t, s.URL()))
	for round, between := range []int{0, 0, 1, 200} {
		name := fmt.Sprint("channel-", round)
		if round > 0 {
			publish(t, b, name, "before")
		}
		f := frame("lost reply " + name)
		cut := proxy.CutBeforeReplyFunc(f.Data, func([]byte) bool {
			page, err := other.Read(context.Background(), name, dchannel.Position{}, 1<<20)
			n := len(page.Entries)
			return err == nil && n > 0 && page.Entries[n-1].ID == f.ID
		})
		_, err := b.Publish(t.Context(), name, f)
		require.ErrorIs(t, err, dchannel.ErrUncertain)
		<-cut
		for range between {
			publish(t, other, name, "between")
		}
		f.Age = time.Second
		pos, err := persistently(t, b, name, f)
		require.NoError(t, err)
		entries := readAll(t, other, name).Entries
		times := 0
		for _, e := range entries {
			if e.ID == f.ID {
				times++
				require.Equal(t, pos, e.Position)
			}
		}
		require.Equal(t, 1, times)
		// Once more, although it is settled: from the log alone.
		again, err := b.Publish(t.Context(), name, f)
		require.NoError(t, err)
		require.Equal(t, pos, again)
	}
}

func TestRetryBelowTheMarker(t *testing.T) {
	b := backend(t, connect(t, server(t).URL()))
	f := frame("x")
	pos, err := b.Publish(t.Context(), "a", f)
	require.NoError(t, err)
	_, err = b.MarkClosed(t.Context(), "a", dchannel.NewID(), time.Hour)
	require.NoError(t, err)
	f.Age = time.Second
	again, err := b.Publish(t.Context(), "a", f)
	require.NoError(t, err)
	require.Equal(t, pos, again)
	never := frame("y")
	never.Age = time.Second
	_, err = b.Publish(t.Context(), "a", never)
	require.ErrorIs(t, err, dchannel.ErrChanClosed)
}

func TestRetryThatNobodyCanJudge(t *testing.T) {
	b := backend(t, connect(t, server(t).URL()), etcd.WithRetention(4, time.Hour))
	f := frame("x")
	_, err := b.Publish(t.Context(), "a", f)
	require.NoError(t, err)
	for range 20 {
		publish(t, b, "a", "more")
	}
	f.Age = time.Second
	_, err = b.Publish(t.Context(), "a", f)
	require.ErrorIs(t, err, dchannel.ErrForgotten)
}

// stream publishes to a channel until told to stop, and returns what was accepted.
func stream(t testing.TB, b *etcd.Backend, channel string) (stop func() []dchannel.ID) {
	done := make(chan struct{})
	var ids []dchannel.ID
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-done:
				return
			default:
			}
			f := frame(fmt.Sprint(n))
			if _, err := persistently(t, b, channel, f); err != nil {
				t.Error(err)
				return
			}
			ids = append(ids, f.ID)
		}
	})
	return func() []dchannel.ID { close(done); wg.Wait(); return ids }
}

// sameIDs checks that the entries are the accepted ones, but for those that a watch pushes twice
// when it is opened again where it was.
func sameIDs(t testing.TB, accepted []dchannel.ID, entries []dchannel.Entry) {
	t.Helper()
	var last uint64
	var ids []dchannel.ID
	for _, e := range entries {
		if e.Seq > last {
			last = e.Seq
			ids = append(ids, e.ID)
		}
	}
	require.Len(t, ids, len(accepted))
	for i := range ids {
		require.Equal(t, accepted[i].String(), ids[i].String())
	}
}

// lastIs tells whether the last entry pushed is id's.
func (s *sink) lastIs(id dchannel.ID) func() bool {
	return func() bool { return len(s.entries) > 0 && s.entries[len(s.entries)-1].ID == id }
}

func TestCuts(t *testing.T) {
	s := server(t)
	proxy, c := proxied(t, s)
	b := backend(t, c)
	k := subscribe(t, b, "a")
	stop := stream(t, b, "a")
	for cut := range 30 {
		k.mu.Lock()
		have := len(k.entries)
		k.mu.Unlock()
		k.await(t, "pushes between cuts", k.count(have+3))
		if cut%10 == 9 {
			require.NoError(t, proxy.Refuse(true))
			proxy.Cut()
			k.await(t, "interrupted", k.lastState(dchannel.StateInterrupted))
			require.NoError(t, proxy.Refuse(false))
			k.await(t, "live", k.lastState(dchannel.StateLive))
		} else {
			proxy.Cut()
		}
	}
	accepted := stop()
	entries := readAll(t, b, "a").Entries
	sameIDs(t, accepted, entries)
	k.await(t, "all pushed", k.lastIs(accepted[len(accepted)-1]))
	sameIDs(t, accepted, k.entries) // the watch resumes where it was
}

func TestKilledServerWithItsData(t *testing.T) {
	s := server(t)
	b := backend(t, connect(t, s.URL()))
	before, err := b.Heads(t.Context(), nil)
	require.NoError(t, err)
	require.Empty(t, before)
	was, err := b.Heads(t.Context(), []string{"a"})
	require.NoError(t, err)
	k := subscribe(t, b, "a")
	stop := stream(t, b, "a")
	for range 3 {
		k.mu.Lock()
		have := len(k.entries)
		k.mu.Unlock()
		k.await(t, "pushes", k.count(have+3))
		require.NoError(t, s.Kill())
		k.await(t, "interrupted", k.lastState(dchannel.StateInterrupted))
		require.NoError(t, s.Restart(t.Context()))
		k.await(t, "live", k.lastState(dchannel.StateLive))
	}
	accepted := stop()
	sameIDs(t, accepted, readAll(t, b, "a").Entries)
	k.await(t, "all pushed", k.lastIs(accepted[len(accepted)-1]))
	sameIDs(t, accepted, k.entries)
	now, err := b.Heads(t.Context(), []string{"a"})
	require.NoError(t, err)
	require.Equal(t, was[0].Incarnation, now[0].Incarnation)
}

func TestWipedServer(t *testing.T) {
	s := server(t)
	b := backend(t, connect(t, s.URL()))
	k := subscribe(t, b, "a")
	for range 50 {
		publish(t, b, "a", "x")
	}
	was, err := b.Heads(t.Context(), []string{"a"})
	require.NoError(t, err)
	require.NoError(t, s.Kill())
	require.NoError(t, s.Wipe())
	require.NoError(t, s.Restart(t.Context()))
	began := time.Now()
	k.await(t, "resync", func() bool { return len(k.resyncs) > 0 && k.lastState(dchannel.StateLive)() })
	t.Log("resync after", time.Since(began))
	now, err := b.Heads(t.Context(), []string{"a"})
	require.NoError(t, err)
	require.NotEqual(t, was[0].Incarnation, now[0].Incarnation)
	require.Zero(t, now[0].Position)
	// Pushes flow again, well below the old revision, and under a new epoch.
	k.mu.Lock()
	have := len(k.entries)
	k.mu.Unlock()
	pos := publish(t, b, "a", "y")
	require.EqualValues(t, 1, pos.Seq)
	require.NotEqual(t, was[0].Epoch, pos.Epoch)
	k.await(t, "push", k.count(have+1))
}

func TestCompactionDuringACut(t *testing.T) {
	s := server(t)
	proxy, c := proxied(t, s)
	b := backend(t, c)
	direct := connect(t, s.URL())
	other := backend(t, direct)
	k := subscribe(t, b, "a")
	at := publish(t, other, "a", "before")
	k.await(t, "push", k.count(1))
	require.NoError(t, proxy.Refuse(true))
	proxy.Cut()
	for range 20 {
		publish(t, other, "a", "missed")
	}
	head, err := direct.Get(t.Context(), "x")
	require.NoError(t, err)
	_, err = direct.Compact(t.Context(), head.Header.Revision, clientv3.WithCompactPhysical())
	require.NoError(t, err)
	require.NoError(t, proxy.Refuse(false))
	k.await(t, "resync", func() bool {
		compacted := func(err error) bool { return errors.Is(err, rpctypes.ErrCompacted) }
		return slices.ContainsFunc(k.resyncs, compacted) && k.lastState(dchannel.StateLive)()
	})
	page, err := b.Read(t.Context(), "a", at, 1<<20)
	require.NoError(t, err)
	require.Len(t, page.Entries, 20) // nothing is missing
	publish(t, other, "a", "after")
	k.await(t, "push", func() bool { return string(k.entries[len(k.entries)-1].Data) == "after" })
}

func TestBlackhole(t *testing.T) {
	for _, heal := range []bool{true, false} {
		t.Run(fmt.Sprint("heal=", heal), func(t *testing.T) {
			s := server(t)
			proxy, c := proxied(t, s)
			b, other := backend(t, c), backend(t, connect(t, s.URL()))
			k := subscribe(t, b, "a")
			publish(t, b, "a", "x")
			k.await(t, "push", k.count(1))
			proxy.Blackhole(faultproxy.Both)
			began := time.Now()
			k.await(t, "interrupted", k.lastState(dchannel.StateInterrupted))
			t.Log("interrupted after", time.Since(began))
			require.Less(t, time.Since(began), 5*time.Second)
			publish(t, other, "a", "missed")
			if heal {
				require.NoError(t, proxy.Heal())
			} else {
				proxy.Blackhole(0) // old connections stay open, with a hole in them
			}
			began = time.Now()
			k.await(t, "live again", func() bool { return len(k.resyncs) > 0 && k.lastState(dchannel.StateLive)() })
			t.Log("live after", time.Since(began))
			_, err := persistently(t, b, "a", frame("after"))
			require.NoError(t, err)
			k.await(t, "push", func() bool { return string(k.entries[len(k.entries)-1].Data) == "after" })
			require.Len(t, readAll(t, b, "a").Entries, 3)
		})
	}
}

func TestPausedServer(t *testing.T) {
	s := server(t)
	b := backend(t, connect(t, s.URL()))
	k := subscribe(t, b, "a")
	require.NoError(t, s.Pause())
	k.await(t, "interrupted", k.lastState(dchannel.StateInterrupted))
	require.NoError(t, s.Resume())
	k.await(t, "live", k.lastState(dchannel.StateLive))
	_, err := persistently(t, b, "a", frame("after"))
	require.NoError(t, err)
	k.await(t, "push", k.count(1))
}

// TestRetryKeepsTheDoubt: that a retry was not sent says nothing about the first attempt.
func TestRetryKeepsTheDoubt(t *testing.T) {
	s := server(t)
	b := backend(t, connect(t, s.URL()))
	publish(t, b, "a", "x")
	require.NoError(t, s.Pause())
	f := frame("y")
	for _, f.Age = range []time.Duration{0, time.Second} {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		_, err := b.Publish(ctx, "a", f)
		cancel()
		require.ErrorIs(t, err, dchannel.ErrUncertain)
		require.ErrorIs(t, err, context.DeadlineExceeded)
	}
	require.NoError(t, s.Kill())
	require.Eventually(t, func() bool { // the connection is gone, the doubt is not
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := b.Publish(ctx, "a", frame("z"))
		return errors.Is(err, dchannel.ErrUnavailable)
	}, patience, time.Millisecond)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := b.Publish(ctx, "a", f)
	require.ErrorIs(t, err, dchannel.ErrUncertain)
	require.NotErrorIs(t, err, dchannel.ErrUnavailable)
	require.NoError(t, s.Restart(t.Context()))
	_, err = persistently(t, b, "a", f)
	require.NoError(t, err)
	require.Len(t, readAll(t, b, "a").Entries, 2)
}

func TestServerAway(t *testing.T) {
	s := server(t)
	b := backend(t, connect(t, s.URL()))
	publish(t, b, "a", "x")
	require.NoError(t, s.Kill())
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	conn := 0
	for ; ; conn++ { // the first may still go out on the connection that has just broken
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		_, err := b.Publish(ctx, "a", frame("y"))
		cancel()
		if errors.Is(err, dchannel.ErrUnavailable) {
			require.ErrorIs(t, err, context.DeadlineExceeded)
			break
		}
		require.ErrorIs(t, err, dchannel.ErrUncertain)
		require.Less(t, conn, 50)
	}
	_, err := b.Subscribe(ctx, "a", newSink())
	require.Error(t, err)
}

// TestQuietAfterACut: where nothing is written, the client resumes the watch at a revision in the
// future, which is no reason to think that it is dead.
func TestQuietAfterACut(t *testing.T) {
	s := server(t)
	proxy, c := proxied(t, s)
	b := backend(t, c, etcd.WithProbe(time.Minute, 2*time.Second)) // none is under way when the cut comes
	k := subscribe(t, b, "a")
	publish(t, b, "a", "x")
	k.await(t, "push", k.count(1))
	proxy.Cut()
	direct := connect(t, s.URL())
	quiet := func() int64 {
		r, err := direct.Get(t.Context(), "x")
		require.NoError(t, err)
		return r.Header.Revision
	}
	began := quiet()
	require.Eventually(t, func() bool { return quiet() > began }, patience, 5*time.Millisecond)
	publish(t, b, "a", "y")
	k.await(t, "push", k.count(2))
	require.Empty(t, k.resyncs)
	require.LessOrEqual(t, quiet(), began+2)
}
