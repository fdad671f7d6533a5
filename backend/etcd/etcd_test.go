package etcd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/etcd"
	"github.com/dchannel/dchannel/internal/lockproof"
	"github.com/dchannel/dchannel/internal/testserver"
)

func TestMain(m *testing.M) {
	// The client's logger tells of every broken connection, which is what these tests make.
	if err := os.Setenv("ETCD_CLIENT_DEBUG", "panic"); err != nil {
		panic(err)
	}
	if lockproof.Child(openInChild, nil) {
		return
	}
	goleak.VerifyTestMain(m)
}

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

// server starts an etcd of the test's own.
func server(t testing.TB, args ...string) *testserver.Server {
	return testserver.EtcdForTest(t, testserver.EtcdConfig{NoFsync: true, Args: args})
}

func connect(t testing.TB, endpoint string) *clientv3.Client {
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

func backend(t testing.TB, c *clientv3.Client, opts ...etcd.Option) *etcd.Backend {
	b := etcd.New(c, append([]etcd.Option{etcd.WithProbe(200*time.Millisecond, 500*time.Millisecond)}, opts...)...)
	t.Cleanup(func() { require.NoError(t, b.Close()) })
	return b
}

// frame is one record, or as many as given.
func frame(data string, count ...int) dchannel.Frame {
	f := dchannel.Frame{ID: dchannel.NewID(), Count: 1, Data: []byte(data)}
	if len(count) > 0 {
		f.Count = count[0]
	}
	return f
}

func publish(t testing.TB, b *etcd.Backend, channel, data string) dchannel.Position {
	pos, err := b.Publish(t.Context(), channel, frame(data))
	require.NoError(t, err)
	return pos
}

// readAll reads all there is and checks that it is one unbroken chain, from a first entry on.
func readAll(t testing.TB, b *etcd.Backend, channel string) dchannel.Page {
	page, err := b.Read(t.Context(), channel, dchannel.Position{}, 1<<30)
	require.NoError(t, err)
	chained(t, page.Entries)
	if n := len(page.Entries); n > 0 {
		require.Equal(t, page.Head.Position, page.Entries[n-1].Position)
		require.Equal(t, page.Head.ID, page.Entries[n-1].ID)
	}
	return page
}

func chained(t testing.TB, entries []dchannel.Entry) {
	for i := 1; i < len(entries); i++ {
		require.Equal(t, entries[i-1].Epoch, entries[i].Epoch)
		require.Equal(t, entries[i-1].Seq+1, entries[i].First())
		require.Equal(t, entries[i-1].ID, entries[i].Prev)
	}
}

// sink records what it is told, and lets a test wait for it.
type sink struct {
	mu      sync.Mutex
	entries []dchannel.Entry
	resyncs []error
	states  []dchannel.State
	changed chan struct{}
	running bool
}

func newSink() *sink { return &sink{changed: make(chan struct{})} }

func (s *sink) note(f func()) {
	s.mu.Lock()
	if s.running {
		panic("calls for one sink overlap")
	}
	s.running = true
	f()
	s.running = false
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
}

func (s *sink) Entry(e dchannel.Entry)           { s.note(func() { s.entries = append(s.entries, e) }) }
func (s *sink) Resync(err error)                 { s.note(func() { s.resyncs = append(s.resyncs, err) }) }
func (s *sink) State(st dchannel.State, _ error) { s.note(func() { s.states = append(s.states, st) }) }

func (s *sink) await(t testing.TB, what string, cond func() bool) {
	deadline := time.After(patience)
	for {
		s.mu.Lock()
		ok, changed := cond(), s.changed
		s.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			require.FailNow(t, "not in time: "+what, "%d entries, states %v, resyncs %v",
				len(s.entries), s.states[max(len(s.states)-8, 0):], s.resyncs[max(len(s.resyncs)-8, 0):])
		}
	}
}

func (s *sink) count(n int) func() bool { return func() bool { return len(s.entries) >= n } }

func (s *sink) lastState(want dchannel.State) func() bool {
	return func() bool { return len(s.states) > 0 && s.states[len(s.states)-1] == want }
}

func subscribe(t testing.TB, b *etcd.Backend, channel string) *sink {
	s := newSink()
	sub, err := b.Subscribe(t.Context(), channel, s)
	require.NoError(t, err)
	t.Cleanup(sub.Close)
	return s
}

func TestAppendReadHeads(t *testing.T) {
	b := backend(t, connect(t, server(t).URL()))
	heads, err := b.Heads(t.Context(), []string{"a"})
	require.NoError(t, err)
	require.Zero(t, heads[0].Position)
	require.NotZero(t, heads[0].Incarnation)

	first, err := b.Publish(t.Context(), "a", frame("one", 3))
	require.NoError(t, err)
	require.EqualValues(t, 3, first.Seq)
	second, err := b.Publish(t.Context(), "a", frame("", 1))
	require.NoError(t, err)
	require.Equal(t, dchannel.Position{Epoch: first.Epoch, Seq: 4}, second)

	page := readAll(t, b, "a")
	require.Len(t, page.Entries, 2)
	require.Equal(t, "one", string(page.Entries[0].Data))
	require.Empty(t, page.Entries[1].Data)
	require.InDelta(t, time.Now().UnixMilli(), page.Entries[0].Time, 60_000)

	// In the middle of a frame: the whole frame comes.
	page, err = b.Read(t.Context(), "a", dchannel.Position{Epoch: first.Epoch, Seq: 1}, 1)
	require.NoError(t, err)
	require.Len(t, page.Entries, 1)
	require.Equal(t, first, page.Entries[0].Position)
	page, err = b.Read(t.Context(), "a", second, 1)
	require.NoError(t, err)
	require.Empty(t, page.Entries)
	// Another epoch: from the oldest.
	page, err = b.Read(t.Context(), "a", dchannel.Position{Epoch: 7, Seq: 99}, 1<<20)
	require.NoError(t, err)
	require.Len(t, page.Entries, 2)

	after, err := b.Heads(t.Context(), []string{"b", "a"})
	require.NoError(t, err)
	require.Equal(t, second, after[1].Position)
	require.Equal(t, heads[0].Incarnation, after[0].Incarnation)
	none, err := b.Heads(t.Context(), nil)
	require.NoError(t, err)
	require.Empty(t, none)
}

func TestManyHeads(t *testing.T) {
	b := backend(t, connect(t, server(t).URL()))
	var names []string
	for i := range 1000 {
		names = append(names, fmt.Sprint("channel-", i))
	}
	for i := 0; i < 1000; i += 100 {
		for range i/100 + 1 {
			publish(t, b, names[i], "x")
		}
	}
	heads, err := b.Heads(t.Context(), names)
	require.NoError(t, err)
	for i, h := range heads {
		want := uint64(0)
		if i%100 == 0 {
			want = uint64(i/100 + 1)
		}
		require.Equal(t, want, h.Seq, names[i])
		require.Equal(t, heads[0].Incarnation, h.Incarnation)
	}
}

func TestReadPages(t *testing.T) {
	b := backend(t, connect(t, server(t).URL()))
	for i := range 200 {
		_, err := b.Publish(t.Context(), "a", frame(string(bytes.Repeat([]byte{byte(i)}, i*10))))
		require.NoError(t, err)
	}
	require.Len(t, readAll(t, b, "a").Entries, 200)
	for _, limit := range []int{0, 1, 5000, 50_000} {
		var all []dchannel.Entry
		var at dchannel.Position
		for {
			page, err := b.Read(t.Context(), "a", at, limit)
			require.NoError(t, err)
			if len(page.Entries) == 0 {
				break
			}
			size := 0
			for _, e := range page.Entries[:len(page.Entries)-1] {
				size += len(e.Data)
			}
			require.LessOrEqual(t, size, limit)
			all = append(all, page.Entries...)
			at = all[len(all)-1].Position
		}
		chained(t, all)
		require.Len(t, all, 200)
	}
}

func TestCloseMarker(t *testing.T) {
	b := backend(t, connect(t, server(t).URL()))
	s := subscribe(t, b, "a")
	last := publish(t, b, "a", "x")
	pos, err := b.MarkClosed(t.Context(), "a", dchannel.NewID(), time.Hour)
	require.NoError(t, err)
	require.Equal(t, dchannel.Position{Epoch: last.Epoch, Seq: 2}, pos)
	_, err = b.Publish(t.Context(), "a", frame("y"))
	require.ErrorIs(t, err, dchannel.ErrChanClosed)
	again, err := b.MarkClosed(t.Context(), "a", dchannel.NewID(), time.Minute)
	require.NoError(t, err)
	require.Equal(t, pos, again)
	s.await(t, "marker pushed", s.count(2))
	require.True(t, s.entries[1].Closed)
	page := readAll(t, b, "a")
	require.True(t, page.Head.Closed)
	require.True(t, page.Entries[1].Closed)
	require.Nil(t, page.Entries[1].Data)

	alone, err := b.MarkClosed(t.Context(), "never used", dchannel.NewID(), time.Hour)
	require.NoError(t, err)
	require.EqualValues(t, 1, alone.Seq)

	require.NoError(t, b.Remove(t.Context(), "a"))
	require.NoError(t, b.Remove(t.Context(), "a"))
	require.Empty(t, readAll(t, b, "a").Entries)
	fresh := publish(t, b, "a", "z")
	require.EqualValues(t, 1, fresh.Seq)
	require.NotEqual(t, last.Epoch, fresh.Epoch)
}

func TestNamesDoNotMeet(t *testing.T) {
	b := backend(t, connect(t, server(t).URL()))
	names := []string{"a", "a.b", "a b", "*", ">", "{x}", "日本語", "a/b", "a/", "/a", "/", "a%2Fb", "%", "a/head/b", "log", "a-", "a.", "A", string(bytes.Repeat([]byte{'/'}, 255))}
	sinks := make(map[string]*sink)
	for _, n := range names {
		sinks[n] = subscribe(t, b, n)
	}
	for _, n := range names {
		require.EqualValues(t, 1, publish(t, b, n, n).Seq, n)
	}
	for _, n := range names {
		require.EqualValues(t, 2, publish(t, b, n, n).Seq, n)
		page := readAll(t, b, n)
		require.Len(t, page.Entries, 2, n)
	}
	for _, n := range names {
		s := sinks[n]
		s.await(t, n, s.count(2))
		require.Len(t, s.entries, 2)
		for _, e := range s.entries {
			require.Equal(t, n, string(e.Data))
		}
	}
	require.NoError(t, b.Remove(t.Context(), "a"))
	for _, n := range names[1:] {
		require.Len(t, readAll(t, b, n).Entries, 2, n)
	}
}

func TestConcurrentAppendsAreOneChain(t *testing.T) {
	url := server(t).URL()
	const backends, each = 8, 60
	var wg sync.WaitGroup
	var all []*etcd.Backend
	for range backends {
		all = append(all, backend(t, connect(t, url)))
	}
	s := subscribe(t, all[0], "a")
	for i, b := range all {
		wg.Go(func() {
			for n := range each {
				if _, err := b.Publish(t.Context(), "a", frame(fmt.Sprint(i, " ", n), 1+n%3)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	page := readAll(t, all[1], "a")
	require.Len(t, page.Entries, backends*each)
	require.EqualValues(t, 1, page.Entries[0].First())
	s.await(t, "all pushed", s.count(backends*each))
	chained(t, s.entries)
	next := make(map[string]int) // each publisher's own order
	for _, e := range page.Entries {
		var who, n int
		_, err := fmt.Sscan(string(e.Data), &who, &n)
		require.NoError(t, err)
		require.Equal(t, next[fmt.Sprint(who)], n)
		next[fmt.Sprint(who)]++
	}
}

func TestCloseRacesPublish(t *testing.T) {
	url := server(t).URL()
	for round := range 20 {
		a, b := backend(t, connect(t, url)), backend(t, connect(t, url))
		name := fmt.Sprint("round ", round)
		var wg sync.WaitGroup
		accepted := 0
		wg.Go(func() {
			for {
				if _, err := a.Publish(t.Context(), name, frame("x")); err != nil {
					if !errors.Is(err, dchannel.ErrChanClosed) {
						t.Error(err)
					}
					return
				}
				accepted++
			}
		})
		pos, err := b.MarkClosed(t.Context(), name, dchannel.NewID(), time.Hour)
		require.NoError(t, err)
		wg.Wait()
		require.EqualValues(t, accepted+1, pos.Seq)
		require.Len(t, readAll(t, b, name).Entries, accepted+1)
	}
}

func TestBadOptions(t *testing.T) {
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{"127.0.0.1:1"}})
	require.NoError(t, err)
	defer c.Close()
	for want, b := range map[string]*etcd.Backend{
		"client is nil":              etcd.New(nil),
		`WithNamespace: ""`:          etcd.New(c, etcd.WithNamespace("")),
		`WithNamespace: "a/log"`:     etcd.New(c, etcd.WithNamespace("a/log")),
		"WithRetention: 0":           etcd.New(c, etcd.WithRetention(0, time.Hour)),
		"WithRetention: 1µs":         etcd.New(c, etcd.WithRetention(1, time.Microsecond)),
		"WithIdleExpiry: 0s":         etcd.New(c, etcd.WithIdleExpiry(0)),
		"WithProbe: 0s, want an int": etcd.New(c, etcd.WithProbe(0, time.Second)),
		"WithProbe: 1ns, want a tim": etcd.New(c, etcd.WithProbe(time.Second, 1)),
		"WithLogger: nil":            etcd.New(c, etcd.WithLogger(nil)),
	} {
		_, err := b.Heads(t.Context(), nil)
		require.ErrorIs(t, err, dchannel.ErrInvalidOption)
		require.ErrorContains(t, err, want)
		require.NoError(t, b.Close())
	}
}

func TestClosedBackend(t *testing.T) {
	c := connect(t, server(t).URL())
	_, err := c.Get(t.Context(), "x")
	require.NoError(t, err)
	before := goleak.IgnoreCurrent()
	b := etcd.New(c)
	s := newSink()
	sub, err := b.Subscribe(t.Context(), "a", s)
	require.NoError(t, err)
	publish(t, b, "a", "x")
	require.NoError(t, b.Close())
	require.NoError(t, b.Close())
	require.True(t, s.lastState(dchannel.StateFailed)())
	sub.Close()
	ctx := t.Context()
	_, err = b.Publish(ctx, "a", frame("x"))
	require.ErrorIs(t, err, dchannel.ErrBackendClosed)
	_, err = b.MarkClosed(ctx, "a", dchannel.NewID(), time.Hour)
	require.ErrorIs(t, err, dchannel.ErrBackendClosed)
	_, err = b.Read(ctx, "a", dchannel.Position{}, 1)
	require.ErrorIs(t, err, dchannel.ErrBackendClosed)
	_, err = b.Heads(ctx, nil)
	require.ErrorIs(t, err, dchannel.ErrBackendClosed)
	_, err = b.Subscribe(ctx, "a", s)
	require.ErrorIs(t, err, dchannel.ErrBackendClosed)
	require.ErrorIs(t, b.Remove(ctx, "a"), dchannel.ErrBackendClosed)
	require.NoError(t, goleak.Find(before))
	_, err = c.Get(ctx, "x") // the client is the caller's
	require.NoError(t, err)
}

// watchers counts the server's watches.
func TestLastSubscriptionEndsTheWatch(t *testing.T) {
	c := connect(t, server(t).URL())
	_, err := c.Get(t.Context(), "x")
	require.NoError(t, err)
	before := goleak.IgnoreCurrent()
	b := backend(t, c)
	for range 3 {
		s := newSink()
		one, err := b.Subscribe(t.Context(), "a", s)
		require.NoError(t, err)
		two, err := b.Subscribe(t.Context(), "b", newSink())
		require.NoError(t, err)
		one.Close()
		one.Close()
		three, err := b.Subscribe(t.Context(), "a", s)
		require.NoError(t, err)
		two.Close()
		publish(t, b, "a", "x")
		s.await(t, "push", s.count(1))
		three.Close()
		require.NoError(t, goleak.Find(before))
	}
}

func TestTooLarge(t *testing.T) {
	b := backend(t, connect(t, server(t).URL()))
	long := string(bytes.Repeat([]byte{'/'}, 255))
	_, err := b.Publish(t.Context(), long, frame(string(make([]byte, b.MaxFrame()))))
	require.NoError(t, err)
	_, err = b.Publish(t.Context(), long, frame(string(make([]byte, b.MaxFrame()))))
	require.NoError(t, err)
	for _, n := range []int{b.MaxFrame() + 20<<10, 3 << 20} {
		_, err = b.Publish(t.Context(), long, frame(string(make([]byte, n))))
		require.ErrorIs(t, err, dchannel.ErrTooLarge)
	}
	require.Len(t, readAll(t, b, long).Entries, 2)
}

func TestContextEnds(t *testing.T) {
	s := server(t)
	b := backend(t, connect(t, s.URL()))
	publish(t, b, "a", "x")
	require.NoError(t, s.Pause())
	defer s.Resume() //nolint:errcheck // the server ends with the test
	for name, call := range map[string]func(context.Context) error{
		"publish": func(ctx context.Context) error { _, err := b.Publish(ctx, "a", frame("x")); return err },
		"mark": func(ctx context.Context) error {
			_, err := b.MarkClosed(ctx, "b", dchannel.NewID(), time.Hour)
			return err
		},
		"read":      func(ctx context.Context) error { _, err := b.Read(ctx, "a", dchannel.Position{}, 1); return err },
		"heads":     func(ctx context.Context) error { _, err := b.Heads(ctx, []string{"a"}); return err },
		"remove":    func(ctx context.Context) error { return b.Remove(ctx, "c") },
		"subscribe": func(ctx context.Context) error { _, err := b.Subscribe(ctx, "a", newSink()); return err },
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		start := time.Now()
		err := call(ctx)
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded, name)
		require.Less(t, time.Since(start), 150*time.Millisecond, name)
		switch name {
		case "publish", "remove":
			require.ErrorIs(t, err, dchannel.ErrUncertain, name)
		case "mark": // it was still waiting for a lease
			require.ErrorIs(t, err, dchannel.ErrUnavailable, name)
		default:
			require.NotErrorIs(t, err, dchannel.ErrUncertain, name)
		}
	}
}
