package nats_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/nats"
	"github.com/dchannel/dchannel/internal/lockproof"
	"github.com/dchannel/dchannel/internal/testserver"
)

func TestMain(m *testing.M) {
	if lockproof.Child(openInChild, nil) {
		return
	}
	goleak.VerifyTestMain(m)
}

const patience = 20 * time.Second

// shared is one server for all tests that do nothing to it; each has its namespace.
var shared struct {
	sync.Mutex
	users  int
	server *testserver.Server
}

// sharedServer returns the server's URL. It is closed when no test uses it.
func sharedServer(t testing.TB) string {
	t.Helper()
	shared.Lock()
	defer shared.Unlock()
	if shared.users++; shared.users == 1 {
		s, err := testserver.StartNATS(context.Background(), testserver.NATSConfig{})
		require.NoError(t, err)
		shared.server = s
	}
	t.Cleanup(func() {
		shared.Lock()
		defer shared.Unlock()
		if t.Failed() {
			t.Log(shared.server.Log())
		}
		if shared.users--; shared.users == 0 {
			require.NoError(t, shared.server.Close())
		}
	})
	return shared.server.URL()
}

// connect returns a connection as users should have it, that comes back at once.
func connect(t testing.TB, url string, opts ...natsgo.Option) *natsgo.Conn {
	t.Helper()
	conn, err := natsgo.Connect(url, append([]natsgo.Option{
		natsgo.MaxReconnects(-1), natsgo.ReconnectWait(10 * time.Millisecond), natsgo.ReconnectJitter(0, 0),
		natsgo.ErrorHandler(func(*natsgo.Conn, *natsgo.Subscription, error) {}),
	}, opts...)...)
	require.NoError(t, err)
	closed := make(chan struct{})
	conn.SetClosedHandler(func(*natsgo.Conn) { close(closed) })
	t.Cleanup(func() { conn.Close(); <-closed })
	return conn
}

// backend returns a backend on a connection of its own.
func backend(t testing.TB, url string, opts ...nats.Option) *nats.Backend {
	t.Helper()
	b := nats.New(connect(t, url), append([]nats.Option{nats.WithNamespace(t.Name())}, opts...)...)
	t.Cleanup(func() { require.NoError(t, b.Close()) })
	return b
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func frame(data string) dchannel.Frame {
	return dchannel.Frame{ID: dchannel.NewID(), Count: 1, Data: []byte(data)}
}

func publish(t testing.TB, b *nats.Backend, channel, data string) dchannel.Position {
	t.Helper()
	pos, err := b.Publish(within(t), channel, frame(data))
	require.NoError(t, err)
	return pos
}

func readAll(t testing.TB, b *nats.Backend, channel string, after dchannel.Position) dchannel.Page {
	t.Helper()
	page, err := b.Read(within(t), channel, after, 1<<30)
	require.NoError(t, err)
	return page
}

func head(t testing.TB, b *nats.Backend, channel string) dchannel.Head {
	t.Helper()
	heads, err := b.Heads(within(t), []string{channel})
	require.NoError(t, err)
	require.Len(t, heads, 1)
	return heads[0]
}

// sink records what is pushed.
type sink struct {
	mu      sync.Mutex
	changed chan struct{}
	entries []dchannel.Entry
	resyncs int
	states  []dchannel.State
}

func newSink() *sink { return &sink{changed: make(chan struct{})} }

func (s *sink) note(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *sink) Entry(e dchannel.Entry) { s.note(func() { s.entries = append(s.entries, e) }) }
func (s *sink) Resync(error)           { s.note(func() { s.resyncs++ }) }
func (s *sink) State(st dchannel.State, _ error) {
	s.note(func() { s.states = append(s.states, st) })
}

// await returns when ok holds.
func (s *sink) await(t testing.TB, what string, ok func(*sink) bool) {
	t.Helper()
	deadline := time.After(patience)
	for {
		s.mu.Lock()
		done, changed := ok(s), s.changed
		s.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("no %s in %v: %d entries, %d resyncs, states %v", what, patience, len(s.entries), s.resyncs, s.states)
		}
	}
}

func (s *sink) awaitEntries(t testing.TB, n int) []dchannel.Entry {
	t.Helper()
	s.await(t, "entries", func(s *sink) bool { return len(s.entries) >= n })
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.entries
}

func subscribe(t testing.TB, b *nats.Backend, channel string) *sink {
	t.Helper()
	s := newSink()
	sub, err := b.Subscribe(within(t), channel, s)
	require.NoError(t, err)
	t.Cleanup(sub.Close)
	return s
}

// requireLog fails unless the entries are one log without holes.
func requireLog(t testing.TB, entries []dchannel.Entry) {
	t.Helper()
	for i, e := range entries {
		if i == 0 {
			continue
		}
		p := entries[i-1]
		require.Equal(t, p.Epoch, e.Epoch, "entry %d", i)
		require.Equal(t, p.Seq+1, e.First(), "entry %d", i)
		require.Equal(t, p.ID, e.Prev, "entry %d", i)
	}
}

func errorIs(err, target error) bool { return errors.Is(err, target) }
