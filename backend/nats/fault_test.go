package nats_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/nats"
	"github.com/dchannel/dchannel/internal/faultproxy"
	"github.com/dchannel/dchannel/internal/testserver"
)

func proxy(t *testing.T, url string) *faultproxy.Proxy {
	t.Helper()
	p, err := faultproxy.New(strings.TrimPrefix(url, "nats://"))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	return p
}

func behind(t *testing.T, p *faultproxy.Proxy, opts ...nats.Option) *nats.Backend {
	t.Helper()
	return backend(t, "nats://"+p.Addr(), opts...)
}

// insist publishes as the core does: what is unavailable or uncertain is tried again.
func insist(t *testing.T, b *nats.Backend, channel string, f dchannel.Frame) dchannel.Position {
	t.Helper()
	began := time.Now()
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		pos, err := b.Publish(ctx, channel, f)
		cancel()
		if err == nil {
			return pos
		}
		if time.Since(began) > 2*patience || !errorIs(err, dchannel.ErrUncertain) && !errorIs(err, dchannel.ErrUnavailable) && !errorIs(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		<-time.After(time.Millisecond) // the core's pause before it tries again
		f.Age = time.Since(began)
	}
}

func TestLostReplyIsNotASecondAppend(t *testing.T) {
	url := sharedServer(t)
	p := proxy(t, url)
	b := behind(t, p)
	publish(t, b, "c", "before")
	f := frame("needle in the stack")
	sprung := p.CutBeforeReplyFunc([]byte("needle"), func(reply []byte) bool { return bytes.Contains(reply, []byte(`"seq"`)) })
	_, err := b.Publish(within(t), "c", f)
	require.ErrorIs(t, err, dchannel.ErrUncertain)
	<-sprung
	other := backend(t, url)
	publish(t, other, "c", "between")
	pos := insist(t, b, "c", dchannel.Frame{ID: f.ID, Count: 1, Data: f.Data, Age: time.Millisecond})
	require.EqualValues(t, 2, pos.Seq)
	entries := readAll(t, b, "c", dchannel.Position{}).Entries
	require.Len(t, entries, 3)
	requireLog(t, entries)
}

func TestCutsUnderLoad(t *testing.T) {
	url := sharedServer(t)
	p := proxy(t, url)
	b, other := behind(t, p), backend(t, url)
	s := subscribe(t, b, "c")
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(rand.IntN(60)) * time.Millisecond):
				p.Cut()
			}
		}
	}()
	const n = 1500
	ids := make([]dchannel.ID, 0, n)
	for i := range n {
		f := frame(fmt.Sprint(i))
		ids = append(ids, f.ID)
		insist(t, b, "c", f)
		if i%10 == 0 {
			f := frame("other")
			ids = append(ids, f.ID)
			insist(t, other, "c", f)
		}
	}
	close(stop)
	<-done
	entries := readAll(t, other, "c", dchannel.Position{}).Entries
	require.Len(t, entries, len(ids))
	requireLog(t, entries)
	for i, e := range entries {
		require.Equal(t, ids[i], e.ID)
	}
	require.Positive(t, p.Cuts())
	s.await(t, "resync", func(s *sink) bool { return s.resyncs > 0 && s.states[len(s.states)-1] == dchannel.StateLive })
	last := publish(t, other, "c", "last")
	s.await(t, "push", func(s *sink) bool { return len(s.entries) > 0 && s.entries[len(s.entries)-1].Position == last })
	require.Contains(t, s.states, dchannel.StateInterrupted)
}

func TestServerIsKilledAndKeepsItsData(t *testing.T) {
	server := testserver.NATSForTest(t, testserver.NATSConfig{})
	b := backend(t, server.URL())
	s := subscribe(t, b, "c")
	was := head(t, b, "c").Incarnation
	total := 0
	for range 3 {
		for range 200 {
			insist(t, b, "c", frame("x"))
			total++
		}
		resyncs := 0
		s.await(t, "", func(s *sink) bool { resyncs = s.resyncs; return true })
		require.NoError(t, server.Kill())
		s.await(t, "interruption", func(s *sink) bool { return s.states[len(s.states)-1] == dchannel.StateInterrupted })
		_, err := b.Publish(within(t), "c", frame("x"))
		require.ErrorIs(t, err, dchannel.ErrUnavailable)
		_, err = b.Heads(within(t), nil)
		require.ErrorIs(t, err, dchannel.ErrUnavailable)
		require.NoError(t, server.Restart(within(t)))
		s.await(t, "resync", func(s *sink) bool { return s.resyncs > resyncs })
	}
	last := insist(t, b, "c", frame("last"))
	s.await(t, "push", func(s *sink) bool { return s.entries[len(s.entries)-1].Position == last })
	page := readAll(t, b, "c", dchannel.Position{})
	require.Len(t, page.Entries, total+1)
	requireLog(t, page.Entries)
	require.Equal(t, was, page.Head.Incarnation)
}

func TestIncarnationChangesWithTheState(t *testing.T) {
	type setup struct {
		config  testserver.NATSConfig
		opts    []nats.Option
		destroy func(*testing.T, *testserver.Server, *natsgo.Conn)
	}
	restart := func(t *testing.T, s *testserver.Server, wipe bool) {
		require.NoError(t, s.Kill())
		if wipe {
			require.NoError(t, s.Wipe())
		}
		require.NoError(t, s.Restart(within(t)))
	}
	api := func(verb string) func(*testing.T, *testserver.Server, *natsgo.Conn) {
		return func(t *testing.T, _ *testserver.Server, conn *natsgo.Conn) {
			m, err := conn.Request("$JS.API.STREAM."+verb+".x", nil, patience)
			require.NoError(t, err)
			require.Contains(t, string(m.Data), `"success":true`)
		}
	}
	for name, c := range map[string]setup{
		"Wiped":   {destroy: func(t *testing.T, s *testserver.Server, _ *natsgo.Conn) { restart(t, s, true) }},
		"Memory":  {opts: []nats.Option{nats.WithStorage(jetstream.MemoryStorage)}, destroy: func(t *testing.T, s *testserver.Server, _ *natsgo.Conn) { restart(t, s, false) }},
		"Deleted": {destroy: api("DELETE")},
		"Purged":  {destroy: api("PURGE")},
	} {
		t.Run(name, func(t *testing.T) {
			server := testserver.NATSForTest(t, c.config)
			opts := append([]nats.Option{nats.WithNamespace("x")}, c.opts...)
			b, other := backend(t, server.URL(), opts...), backend(t, server.URL(), opts...)
			s := subscribe(t, b, "c")
			first := publish(t, b, "c", "x")
			s.awaitEntries(t, 1)
			was := head(t, b, "c")
			require.Equal(t, was, head(t, other, "c"))
			c.destroy(t, server, connect(t, server.URL()))
			now := dchannel.Head{}
			require.Eventually(t, func() bool {
				heads, err := b.Heads(within(t), []string{"c"})
				if err != nil {
					require.ErrorIs(t, err, dchannel.ErrUnavailable)
					return false
				}
				now = heads[0]
				return true
			}, patience, time.Millisecond)
			require.NotEqual(t, was.Incarnation, now.Incarnation)
			require.Zero(t, now.Position)
			next := insist(t, other, "c", frame("y"))
			require.Greater(t, next.Epoch, first.Epoch)
			require.EqualValues(t, 1, next.Seq)
			h := head(t, b, "c")
			require.Equal(t, next, h.Position)
			require.Equal(t, now.Incarnation, h.Incarnation)
			require.Equal(t, h, head(t, other, "c"))
			s.awaitEntries(t, 2)
			require.Len(t, readAll(t, b, "c", first).Entries, 1)
		})
	}
}

// A stream that comes back from a backup, or after a power cut, is the same one without its
// newest messages.
func TestARewoundStreamIsAnotherIncarnation(t *testing.T) {
	store := t.TempDir()
	server := testserver.NATSForTest(t, testserver.NATSConfig{
		NoJetStream: true, Config: fmt.Sprintf("jetstream { store_dir: %q, sync_interval: always }", store),
	})
	b, other := backend(t, server.URL()), backend(t, server.URL())
	for range 10 {
		publish(t, b, "c", "x")
	}
	subscribe(t, other, "c")
	middle := readAll(t, other, "c", dchannel.Position{}).Head
	require.NoError(t, server.Stop())
	saved := t.TempDir()
	require.NoError(t, os.CopyFS(saved, os.DirFS(store)))
	require.NoError(t, server.Restart(within(t)))
	for range 10 {
		insist(t, b, "c", frame("lost"))
	}
	was := head(t, b, "c")
	require.Equal(t, middle.Incarnation, was.Incarnation, "a restart with all data is none")
	require.NoError(t, server.Kill())
	require.NoError(t, os.RemoveAll(store))
	require.NoError(t, os.CopyFS(store, os.DirFS(saved)))
	require.NoError(t, server.Restart(within(t)))
	next := insist(t, b, "c", frame("new"))
	require.Equal(t, dchannel.Position{Epoch: middle.Epoch, Seq: 11}, next)
	require.NotEqual(t, was.Incarnation, head(t, b, "c").Incarnation)
	page := readAll(t, b, "c", middle.Position)
	require.Len(t, page.Entries, 1)
	require.Equal(t, middle.ID, page.Entries[0].Prev)
	require.Equal(t, middle.Incarnation, head(t, backend(t, server.URL()), "c").Incarnation, "who has seen nothing lost")
}

func TestBlackholeIsNoticed(t *testing.T) {
	url := sharedServer(t)
	p := proxy(t, url)
	b := behind(t, p, nats.WithProbe(50*time.Millisecond, 200*time.Millisecond))
	s := subscribe(t, b, "c")
	publish(t, b, "c", "x")
	p.Blackhole(faultproxy.Both)
	began := time.Now()
	_, err := b.Publish(within(t), "c", frame("x"))
	require.Less(t, time.Since(began), 2*time.Second)
	require.True(t, errorIs(err, dchannel.ErrUncertain) || errorIs(err, dchannel.ErrUnavailable), "%v", err)
	s.await(t, "interruption", func(s *sink) bool { return s.states[len(s.states)-1] == dchannel.StateInterrupted })
	require.NoError(t, p.Heal())
	s.await(t, "resync", func(s *sink) bool { return s.resyncs > 0 && s.states[len(s.states)-1] == dchannel.StateLive })
	n := len(readAll(t, b, "c", dchannel.Position{}).Entries)
	pos := publish(t, b, "c", "y")
	require.EqualValues(t, n+1, pos.Seq)
	s.await(t, "push", func(s *sink) bool { return s.entries[len(s.entries)-1].Position == pos })
}

func TestPausedServer(t *testing.T) {
	server := testserver.NATSForTest(t, testserver.NATSConfig{})
	b := backend(t, server.URL(), nats.WithProbe(50*time.Millisecond, 200*time.Millisecond))
	s := subscribe(t, b, "c")
	publish(t, b, "c", "x")
	require.NoError(t, server.Pause())
	_, err := b.Publish(within(t), "c", frame("x"))
	require.Error(t, err)
	require.NoError(t, server.Resume())
	s.await(t, "resync", func(s *sink) bool { return s.resyncs > 0 && s.states[len(s.states)-1] == dchannel.StateLive })
	pos := insist(t, b, "c", frame("y"))
	entries := readAll(t, b, "c", dchannel.Position{}).Entries
	requireLog(t, entries)
	require.Equal(t, pos, entries[len(entries)-1].Position)
}

func TestContextsAreHeeded(t *testing.T) {
	url := sharedServer(t)
	p := proxy(t, url)
	b := behind(t, p, nats.WithProbe(time.Hour, time.Hour))
	publish(t, b, "c", "x")
	sub, err := b.Subscribe(within(t), "closed meanwhile", newSink())
	require.NoError(t, err)
	p.Blackhole(faultproxy.Both)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	_, err = b.Publish(ctx, "c", frame("x"))
	cancel()
	require.ErrorIs(t, err, dchannel.ErrUncertain)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	// Fill what the system takes for a peer that does not read: from then on the
	// client blocks with its lock held.
	big := strings.Repeat("x", 1<<20-512)
	calls := map[string]func(ctx context.Context) error{
		"Publish": func(ctx context.Context) error { _, err := b.Publish(ctx, "c", frame(big)); return err },
		"MarkClosed": func(ctx context.Context) error {
			_, err := b.MarkClosed(ctx, "d", dchannel.NewID(), time.Hour)
			return err
		},
		"Read":   func(ctx context.Context) error { _, err := b.Read(ctx, "c", dchannel.Position{}, 1); return err },
		"Heads":  func(ctx context.Context) error { _, err := b.Heads(ctx, nil); return err },
		"Remove": func(ctx context.Context) error { return b.Remove(ctx, "c") },
		"Subscribe": func(ctx context.Context) error {
			_, err := b.Subscribe(ctx, "e", newSink())
			return err
		},
	}
	for round := range 20 {
		for name, call := range calls {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
			began := time.Now()
			err := call(ctx)
			took := time.Since(began)
			cancel()
			require.ErrorIs(t, err, context.DeadlineExceeded, name)
			require.Less(t, took, 110*time.Millisecond, "%s in round %d", name, round)
			ctx, cancel = context.WithCancel(context.Background())
			cancel()
			require.ErrorIs(t, call(ctx), context.Canceled)
		}
	}
	began := time.Now()
	sub.Close()
	require.Less(t, time.Since(began), 100*time.Millisecond)
	p.Cut() // so that the client's write returns before the test closes the connection
	require.NoError(t, p.Heal())
}

func TestCluster(t *testing.T) {
	nodes := testserver.NATSClusterForTest(t, 3, testserver.NATSConfig{})
	var backends []*nats.Backend
	for _, n := range nodes {
		var urls []string
		for _, m := range nodes {
			if m != n {
				urls = append(urls, m.URL())
			}
		}
		conn := connect(t, strings.Join(append([]string{n.URL()}, urls...), ","), natsgo.DontRandomize())
		b := nats.New(conn, nats.WithNamespace("x"), nats.WithReplicas(3), nats.WithProbe(500*time.Millisecond, 500*time.Millisecond))
		t.Cleanup(func() { require.NoError(t, b.Close()) })
		backends = append(backends, b)
	}
	s := subscribe(t, backends[2], "c")
	ids := map[dchannel.ID]int{}
	was := head(t, backends[0], "c").Incarnation
	n := 0
	round := func() {
		t.Helper()
		for range 100 {
			b := backends[n%len(backends)]
			f := frame(fmt.Sprint(n))
			ids[f.ID] = n
			pos := insist(t, b, "c", f)
			n++
			// Nobody reads less than they have been told.
			page, err := b.Read(within(t), "c", dchannel.Position{Epoch: pos.Epoch, Seq: pos.Seq - 1}, 1<<20)
			if err == nil {
				require.GreaterOrEqual(t, page.Head.Seq, pos.Seq)
				require.NotEmpty(t, page.Entries)
			} else {
				require.ErrorIs(t, err, dchannel.ErrUnavailable)
			}
		}
	}
	round()
	for _, node := range nodes {
		require.NoError(t, node.Kill())
		round()
		require.NoError(t, node.Restart(within(t)))
		round()
	}
	page := dchannel.Page{}
	require.Eventually(t, func() bool {
		var err error
		page, err = backends[1].Read(within(t), "c", dchannel.Position{}, 1<<30)
		return err == nil
	}, 3*patience, 10*time.Millisecond)
	require.Len(t, page.Entries, n)
	requireLog(t, page.Entries)
	for i, e := range page.Entries {
		require.Equal(t, i, ids[e.ID])
	}
	require.Equal(t, was, page.Head.Incarnation)
	last := insist(t, backends[0], "c", frame("last"))
	s.await(t, "push", func(s *sink) bool { return len(s.entries) > 0 && s.entries[len(s.entries)-1].Seq >= last.Seq })
}

// The first append of a log is retried too: there is no log that it could have been in.
func TestFirstAppendIsRetried(t *testing.T) {
	url := sharedServer(t)
	for name, accepted := range map[string]bool{"lost": false, "accepted": true} {
		p := proxy(t, url)
		b := behind(t, p)
		require.Zero(t, head(t, b, name).Position)
		direction := faultproxy.ToServer
		if accepted {
			direction = faultproxy.ToClient
		}
		p.Blackhole(direction)
		f := frame("x")
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		_, err := b.Publish(ctx, name, f)
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.NoError(t, p.Heal())
		f.Age = time.Millisecond
		require.EqualValues(t, 1, insist(t, b, name, f).Seq)
		require.Len(t, readAll(t, b, name, dchannel.Position{}).Entries, 1)
	}
}
