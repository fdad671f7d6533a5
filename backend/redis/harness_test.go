package redis_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/redis"
	"github.com/dchannel/dchannel/internal/faultproxy"
	"github.com/dchannel/dchannel/internal/lockproof"
	"github.com/dchannel/dchannel/internal/testserver"
)

func TestMain(m *testing.M) {
	if lockproof.Child(openInChild, nil) {
		return
	}
	if addr := os.Getenv(holderEnv); addr != "" {
		hold(addr)
		return
	}
	goredis.SetLogger(&logging.VoidLogger{}) // it writes a line for each refused connection
	goleak.VerifyTestMain(m)
}

// within is how long anything may take that has no time of its own.
const within = 20 * time.Second

// fixture is one server, a proxy in front of it, and clients.
type fixture struct {
	t      testing.TB
	server *testserver.Server
	proxy  *faultproxy.Proxy
	admin  *goredis.Client // straight to the server
}

func newFixture(t testing.TB, cfg testserver.RedisConfig) *fixture {
	t.Helper()
	f := &fixture{t: t, server: testserver.RedisForTest(t, cfg)}
	var err error
	f.proxy, err = faultproxy.New(f.server.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { f.proxy.Close() })
	f.admin = f.client(f.server.Addr())
	return f
}

func (f *fixture) client(addr string) *goredis.Client {
	c := goredis.NewClient(&goredis.Options{Addr: addr, ReadTimeout: 2 * time.Second, MaintNotificationsConfig: noMaintenance})
	f.t.Cleanup(func() { c.Close() })
	return c
}

// backend makes a backend with a client of its own, through the proxy.
func (f *fixture) backend(opts ...redis.Option) *redis.Backend {
	b := redis.New(f.client(f.proxy.Addr()), append([]redis.Option{quiet}, opts...)...)
	f.t.Cleanup(func() { b.Close() })
	return b
}

func (f *fixture) info(section, field string) string {
	text, err := f.admin.Info(context.Background(), section).Result()
	require.NoError(f.t, err)
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), field+":"); ok {
			return v
		}
	}
	return ""
}

func ctxFor(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	t.Cleanup(cancel)
	return ctx
}

func frame(text string) dchannel.Frame {
	return dchannel.Frame{ID: dchannel.NewID(), Count: 1, Data: []byte(text)}
}

func publish(t testing.TB, b *redis.Backend, channel, text string) dchannel.Position {
	t.Helper()
	pos, err := b.Publish(ctxFor(t), channel, frame(text))
	require.NoError(t, err)
	return pos
}

func read(t testing.TB, b *redis.Backend, channel string, after dchannel.Position) dchannel.Page {
	t.Helper()
	page, err := b.Read(ctxFor(t), channel, after, 1<<30)
	require.NoError(t, err)
	return page
}

func head(t testing.TB, b *redis.Backend, channel string) dchannel.Head {
	t.Helper()
	heads, err := b.Heads(ctxFor(t), []string{channel})
	require.NoError(t, err)
	require.Len(t, heads, 1)
	return heads[0]
}

func texts(entries []dchannel.Entry) (s []string) {
	for _, e := range entries {
		s = append(s, string(e.Data))
	}
	return s
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	// On this goroutine, and not as require.Eventually does: some conditions count them.
	every := time.NewTicker(time.Millisecond)
	defer every.Stop()
	for end := time.Now().Add(within); !ok(); <-every.C {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}

// recorder is a sink that keeps what it gets, and fails when calls overlap.
type recorder struct {
	t  testing.TB
	in chan struct{}

	mu      sync.Mutex
	entries []dchannel.Entry
	events  []string
	reasons []error
}

func newRecorder(t testing.TB) *recorder { return &recorder{t: t, in: make(chan struct{}, 1)} }

func (r *recorder) enter() func() {
	select {
	case r.in <- struct{}{}:
	default:
		r.t.Error("two calls of one sink overlap")
		return func() {}
	}
	r.mu.Lock()
	return func() {
		r.mu.Unlock()
		<-r.in
	}
}

func (r *recorder) Entry(e dchannel.Entry) {
	defer r.enter()()
	r.entries = append(r.entries, e)
}

func (r *recorder) Resync(reason error) {
	defer r.enter()()
	r.events = append(r.events, "resync")
	r.reasons = append(r.reasons, reason)
}

func (r *recorder) State(s dchannel.State, reason error) {
	defer r.enter()()
	r.events = append(r.events, s.String())
	r.reasons = append(r.reasons, reason)
}

func (r *recorder) texts() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return texts(r.entries)
}

func (r *recorder) count(event string) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		if e == event {
			n++
		}
	}
	return n
}

func (r *recorder) has(text string) func() bool {
	return func() bool { return strings.Contains(fmt.Sprint(r.texts()), text) }
}

func subscribe(t testing.TB, b *redis.Backend, channel string) (*recorder, dchannel.Subscription) {
	t.Helper()
	r := newRecorder(t)
	sub, err := b.Subscribe(ctxFor(t), channel, r)
	require.NoError(t, err)
	t.Cleanup(sub.Close)
	return r, sub
}
