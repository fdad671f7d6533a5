package nats_test

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/nats"
	"github.com/dchannel/dchannel/internal/testserver"
)

func TestUnusableOptionsAreReportedByTheFirstCall(t *testing.T) {
	conn := connect(t, sharedServer(t))
	gives, err := natsgo.Connect(conn.ConnectedUrl())
	require.NoError(t, err)
	t.Cleanup(gives.Close)
	stays, err := natsgo.Connect(conn.ConnectedUrl(), natsgo.NoReconnect())
	require.NoError(t, err)
	t.Cleanup(stays.Close)
	for want, b := range map[string]*nats.Backend{
		"New(nil)":                                nats.New(nil),
		"60 attempts":                             nats.New(gives),
		"nats.MaxReconnects(-1)":                  nats.New(gives),
		"nats.NoReconnect":                        nats.New(stays),
		`WithNamespace("")`:                       nats.New(conn, nats.WithNamespace("")),
		`WithNamespace("a\nb")`:                   nats.New(conn, nats.WithNamespace("a\nb")),
		"WithRetention(0 messages)":               nats.New(conn, nats.WithRetention(0, time.Hour)),
		"WithRetention(1ms)":                      nats.New(conn, nats.WithRetention(1, time.Millisecond)),
		"WithIdleExpiry(-1ns): want 1s":           nats.New(conn, nats.WithIdleExpiry(-1)),
		"WithProbe(0s): want 10ms to 1h":          nats.New(conn, nats.WithProbe(0, time.Second)),
		"WithProbe(2h0m0s)":                       nats.New(conn, nats.WithProbe(time.Second, 2*time.Hour)),
		"WithLogger(nil)":                         nats.New(conn, nats.WithLogger(nil)),
		"WithReplicas(6): want 1 to 5":            nats.New(conn, nats.WithReplicas(6)),
		"WithStorage(7)":                          nats.New(conn, nats.WithStorage(7)),
		"WithReplicas(0): want 1 to 5":            nats.New(conn, nats.WithReplicas(0), nats.WithNamespace("")),
		"WithRetention(87600h0m1s): want 1s to 8": nats.New(conn, nats.WithRetention(1, 10*365*24*time.Hour+time.Second)),
	} {
		_, err := b.Heads(within(t), nil)
		require.ErrorIs(t, err, dchannel.ErrInvalidOption)
		require.ErrorContains(t, err, want)
		_, err = b.Publish(within(t), "c", frame("x"))
		require.ErrorIs(t, err, dchannel.ErrInvalidOption)
		require.NoError(t, b.Close())
	}
}

func TestTheStreamsSettingsAreVerified(t *testing.T) {
	url := sharedServer(t)
	conn := connect(t, url)
	b := backend(t, url)
	publish(t, b, "c", "x")
	for want, opt := range map[string]nats.Option{
		"max_msgs_per_subject (WithRetention's messages and 1) is 16385, want 6": nats.WithRetention(5, time.Minute),
		"storage (WithStorage) is File, want Memory":                             nats.WithStorage(jetstream.MemoryStorage),
		"num_replicas (WithReplicas) is 1, want 3":                               nats.WithReplicas(3),
	} {
		b := nats.New(conn, nats.WithNamespace(t.Name()), opt)
		_, err := b.Heads(within(t), nil)
		require.ErrorIs(t, err, dchannel.ErrInvalidOption)
		require.ErrorContains(t, err, want)
		require.NoError(t, b.Close())
	}
	js, err := jetstream.New(conn)
	require.NoError(t, err)
	_, err = js.CreateStream(within(t), jetstream.StreamConfig{Name: t.Name() + "2", Subjects: []string{"foo2"}})
	require.NoError(t, err)
	b = backend(t, url, nats.WithNamespace(t.Name()+"2"))
	_, err = b.Heads(within(t), nil)
	for _, want := range []string{"subjects is foo2, want ", "allow_direct is false", "allow_msg_ttl is false", "republish is none", "discard is"} {
		require.ErrorContains(t, err, want)
	}
	// What an operator may change.
	s, err := js.Stream(within(t), t.Name())
	require.NoError(t, err)
	cfg := s.CachedInfo().Config
	cfg.MaxBytes, cfg.Compression = 100_000, jetstream.S2Compression
	_, err = js.UpdateStream(within(t), cfg)
	require.NoError(t, err)
	b = backend(t, url)
	f := frame(string(make([]byte, 60_000)))
	_, err = b.Publish(within(t), "c", f)
	require.NoError(t, err)
	f.ID = dchannel.NewID()
	_, err = b.Publish(within(t), "c", f)
	require.ErrorIs(t, err, dchannel.ErrRefused)
	require.ErrorContains(t, err, "maximum bytes exceeded")
}

func TestManyMakeTheStreamAtOnce(t *testing.T) {
	url := sharedServer(t)
	var wg sync.WaitGroup
	incarnations := make([]dchannel.ID, 16)
	for i := range incarnations {
		b := backend(t, url)
		wg.Go(func() {
			heads, err := b.Heads(context.Background(), []string{"c"})
			if err != nil {
				t.Error(err)
				return
			}
			incarnations[i] = heads[0].Incarnation
		})
	}
	wg.Wait()
	for _, id := range incarnations {
		require.Equal(t, incarnations[0], id)
		require.NotZero(t, id)
	}
}

func TestNoJetStream(t *testing.T) {
	server := testserver.NATSForTest(t, testserver.NATSConfig{NoJetStream: true})
	b := backend(t, server.URL())
	_, err := b.Heads(within(t), nil)
	require.ErrorIs(t, err, dchannel.ErrUnavailable)
	require.ErrorContains(t, err, "no JetStream")
}

// The permissions of the package's documentation are enough, and what is missing is named.
func TestPermissions(t *testing.T) {
	const all = `"x.log.*", "x.meta.*", "$JS.API.STREAM.INFO.x", "$JS.API.STREAM.CREATE.x", "$JS.API.STREAM.PURGE.x", "$JS.API.DIRECT.GET.x"`
	user := func(name, publish, subscribe string) string {
		return fmt.Sprintf(`{ user: %s, password: secret, permissions: { publish: [%s], subscribe: [%s] } },`, name, publish, subscribe)
	}
	server := testserver.NATSForTest(t, testserver.NATSConfig{Config: "authorization { users: [" +
		user("full", all, `"_INBOX.>", "x.push.*"`) +
		user("deaf", all, `"_INBOX.>"`) +
		user("mute", `"$JS.API.STREAM.INFO.x", "$JS.API.DIRECT.GET.x"`, `"_INBOX.>", "x.push.*"`) +
		user("none", `"foo"`, `"_INBOX.>"`) + "] }"})
	with := func(name string) *nats.Backend {
		b := nats.New(connect(t, server.URL(), natsgo.UserInfo(name, "secret")), nats.WithNamespace("x"))
		t.Cleanup(func() { require.NoError(t, b.Close()) })
		return b
	}
	full := with("full")
	s := subscribe(t, full, "c")
	publish(t, full, "c", "x")
	_, err := full.MarkClosed(within(t), "c", dchannel.NewID(), time.Hour)
	require.NoError(t, err)
	s.awaitEntries(t, 2)
	require.NoError(t, full.Remove(within(t), "c"))
	publish(t, full, "c", "y")
	hints := make(chan struct{}, 1)
	w, err := full.WatchLock(within(t), "c", hinted(hints))
	require.NoError(t, err)
	defer w.Close()
	token := dchannel.NewID()
	require.True(t, acquire(t, full, "c", token, time.Hour).Mine)
	<-hints
	_, err = full.Extend(within(t), "c", token, time.Hour)
	require.NoError(t, err)
	_, err = full.Release(within(t), "c", token)
	require.NoError(t, err)

	refused := func(err error, subject string) {
		t.Helper()
		require.ErrorIs(t, err, dchannel.ErrRefused)
		require.ErrorContains(t, err, subject)
		require.NotContains(t, err.Error(), "secret")
	}
	deaf := with("deaf")
	publish(t, deaf, "c", "z")
	_, err = deaf.Subscribe(within(t), "c", newSink())
	refused(err, "x.push.c")
	mute := with("mute")
	require.Len(t, readAll(t, mute, "c", dchannel.Position{}).Entries, 2)
	_, err = mute.Publish(within(t), "c", frame("x"))
	refused(err, "x.log.c")
	lockState(t, mute, "c")
	_, err = mute.Acquire(within(t), "c", dchannel.Lease{Token: token, TTL: time.Hour})
	require.NoError(t, err, "it has had its generation")
	_, err = mute.Acquire(within(t), "c", dchannel.Lease{Token: dchannel.NewID(), TTL: time.Hour})
	refused(err, "x.log.lock:c")
	refused(mute.Remove(within(t), "c"), "$JS.API.STREAM.PURGE.x")
	_, err = with("none").Publish(within(t), "c", frame("x"))
	refused(err, "$JS.API.STREAM.INFO.x")
}

func TestClose(t *testing.T) {
	conn := connect(t, sharedServer(t))
	before := conn.NumSubscriptions()
	ignore := goleak.IgnoreCurrent()
	for range 3 {
		b := nats.New(conn, nats.WithNamespace(t.Name()))
		s, closedBefore := newSink(), newSink()
		sub, err := b.Subscribe(within(t), "c", s)
		require.NoError(t, err)
		other, err := b.Subscribe(within(t), "d", closedBefore)
		require.NoError(t, err)
		other.Close()
		other.Close()
		publish(t, b, "c", "x")
		s.awaitEntries(t, 1)
		require.NoError(t, b.Close())
		require.NoError(t, b.Close())
		sub.Close()
		require.Equal(t, dchannel.StateFailed, s.states[len(s.states)-1])
		require.NotContains(t, closedBefore.states, dchannel.StateFailed)
		for _, err := range allCalls(b) {
			require.ErrorIs(t, err, dchannel.ErrBackendClosed)
		}
		require.Equal(t, before, conn.NumSubscriptions())
	}
	require.NoError(t, nats.New(conn).Close(), "never used")
	require.True(t, conn.IsConnected(), "it is the caller's")
	goleak.VerifyNone(t, ignore)
}

func allCalls(b *nats.Backend) []error {
	ctx := context.Background()
	_, publish := b.Publish(ctx, "c", frame("x"))
	_, mark := b.MarkClosed(ctx, "c", dchannel.NewID(), time.Hour)
	_, read := b.Read(ctx, "c", dchannel.Position{}, 1)
	_, heads := b.Heads(ctx, []string{"c"})
	_, subscribe := b.Subscribe(ctx, "c", newSink())
	return []error{publish, mark, read, heads, subscribe, b.Remove(ctx, "c")}
}

func TestCallsUnderWayEndWithClose(t *testing.T) {
	server := testserver.NATSForTest(t, testserver.NATSConfig{})
	b := backend(t, server.URL())
	publish(t, b, "c", "x")
	require.NoError(t, server.Pause())
	errs := make(chan []error, 1)
	go func() { errs <- allCalls(b) }()
	go b.Publish(context.Background(), "c", frame("x")) //nolint:errcheck // below
	result := make(chan error, 1)
	go func() { _, err := b.Publish(context.Background(), "c", frame("x")); result <- err }()
	began := time.Now()
	require.NoError(t, b.Close())
	require.Less(t, time.Since(began), 3*time.Second)
	err := <-result
	require.True(t, errorIs(err, dchannel.ErrBackendClosed) || errorIs(err, dchannel.ErrUncertain), "%v", err)
	for _, err := range (<-errs)[1:] {
		require.ErrorIs(t, err, dchannel.ErrBackendClosed)
	}
	require.NoError(t, server.Resume())
}

func TestTheConnectionIsClosedByItsOwner(t *testing.T) {
	b0 := sharedServer(t)
	conn := connect(t, b0)
	b := nats.New(conn, nats.WithNamespace(t.Name()))
	s := subscribe(t, b, "c")
	publish(t, b, "c", "x")
	conn.Close()
	s.await(t, "failure", func(s *sink) bool { return s.states[len(s.states)-1] == dchannel.StateFailed })
	for _, err := range allCalls(b) {
		require.ErrorIs(t, err, dchannel.ErrBackendClosed)
	}
	require.NoError(t, b.Close())
}

func TestHandlersOfTheConnectionAreTheUsers(t *testing.T) {
	server := testserver.NATSForTest(t, testserver.NATSConfig{})
	down, up := make(chan struct{}, 10), make(chan struct{}, 10)
	conn := connect(t, server.URL(), natsgo.DisconnectErrHandler(func(*natsgo.Conn, error) { down <- struct{}{} }),
		natsgo.ReconnectHandler(func(*natsgo.Conn) { up <- struct{}{} }))
	b := nats.New(conn)
	publish(t, b, "c", "x")
	require.NoError(t, server.Kill())
	<-down
	require.NoError(t, server.Restart(within(t)))
	<-up
	require.NoError(t, b.Close())
	require.NoError(t, server.Kill())
	<-down
}

func TestTenThousandSubscriptions(t *testing.T) {
	const n = 10_000
	server := testserver.NATSForTest(t, testserver.NATSConfig{})
	conn := connect(t, server.URL())
	b := nats.New(conn)
	t.Cleanup(func() { require.NoError(t, b.Close()) })
	publish(t, b, "warm", "x")
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	goroutines, memory, began := runtime.NumGoroutine(), heap(), time.Now()
	s := newSink()
	names := make([]string, n)
	subs := make([]dchannel.Subscription, n)
	var wg sync.WaitGroup
	for worker := range 32 {
		wg.Go(func() {
			for i := worker; i < n; i += 32 {
				names[i] = fmt.Sprint("channel-", i)
				var err error
				if subs[i], err = b.Subscribe(context.Background(), names[i], s); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	more := runtime.NumGoroutine() - goroutines
	t.Logf("subscribed %d in %v, %d bytes a channel, %d goroutines more", n, took, (heap()-memory)/n, more)
	require.Less(t, more, 10)
	for range 3 {
		began = time.Now()
		_, err := b.Heads(within(t), names)
		require.NoError(t, err)
		t.Logf("heads of all in %v", time.Since(began))
	}
	began = time.Now()
	for i := range subs {
		publish(t, b, names[i], "x")
	}
	s.awaitEntries(t, n)
	t.Logf("one entry each in %v", time.Since(began))
	began = time.Now()
	require.NoError(t, server.Kill())
	require.NoError(t, server.Restart(within(t)))
	s.await(t, "resync of all", func(s *sink) bool { return s.resyncs >= n })
	t.Logf("all back %v after a kill and a restart", time.Since(began))
	began = time.Now()
	_, err := b.Heads(within(t), names)
	require.NoError(t, err)
	t.Logf("heads of all afterwards in %v", time.Since(began))
	for _, sub := range subs {
		sub.Close()
	}
	require.Eventually(t, func() bool { return conn.NumSubscriptions() <= 2 }, patience, time.Millisecond)
}
