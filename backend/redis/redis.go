package redis

import (
	"context"
	"fmt"
	"reflect"
	"sync"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/dchannel/dchannel"
)

// Backend is channels in Redis. Make one for each client with [New], and share it:
// all channels of a Backend share one subscription connection.
type Backend struct {
	client goredis.UniversalClient
	o      options
	keys   keys
	ttl    ttls
	err    error // a bad option: the answer to every call
	start  time.Time
	clock  clock
	noise  limiter
	doubts doubts

	done chan struct{} // closed by Close

	mu        sync.Mutex
	closed    bool
	running   sync.WaitGroup // calls aside and the session; no Add once closed
	session   *session       // nil or ended when nobody is subscribed
	refreshed time.Time      // when an append last refreshed the incarnation's TTL
}

var (
	_ dchannel.Backend      = (*Backend)(nil)
	_ dchannel.FrameLimiter = (*Backend)(nil)
	_ dchannel.Locker       = (*Backend)(nil)
)

// ttls are the times to live of the keys, in milliseconds.
type ttls struct{ stream, head, incarnation int64 }

// maxFrame stays below what a subscriber may have to read before Redis closes its
// connection: 8 MiB for a minute.
const maxFrame = 8 << 20

// closeWait bounds how long Close waits for commands that the server does not answer.
// go-redis gives them up by itself after its ReadTimeout.
const closeWait = time.Second

// New returns a backend that keeps its channels in client's server. It sends nothing.
// The client may be one for a single server or for Sentinel; it may be shared with
// other uses, is not closed by [Backend.Close], and must outlive the Backend.
//
// A bad option, or a client that cannot be used, is reported by the first call of a
// method, as [dchannel.ErrInvalidOption].
func New(client goredis.UniversalClient, opts ...Option) *Backend {
	o := defaults()
	for _, opt := range opts {
		opt(&o)
	}
	o.checkClient(client)
	b := &Backend{
		client: client,
		o:      o,
		keys:   partition(o.namespace, 0),
		err:    o.err,
		start:  time.Now(),
		done:   make(chan struct{}),
	}
	idle := max(o.idle, 2*o.retention)
	// An append refreshes the incarnation at most every idle/8 (see
	// refreshIncarnation), and it has to outlive every head.
	b.ttl = ttls{stream: millis(o.retention), head: millis(idle), incarnation: millis(2 * idle)}
	return b
}

func (o *options) checkClient(client goredis.UniversalClient) {
	if client == nil {
		o.invalid("New: the client is nil")
		return
	}
	if v := reflect.ValueOf(client); v.Kind() == reflect.Pointer && v.IsNil() {
		o.invalid("New: the client is a nil %T", client)
		return
	}
	switch client.(type) {
	case *goredis.ClusterClient, *goredis.Ring:
		o.invalid("New: a %T is not supported yet, only a client for one server or for Sentinel", client)
	}
}

// MaxFrame returns 8 MiB; see the package's Limits.
func (b *Backend) MaxFrame() int { return maxFrame }

// Close ends all subscriptions and their connection. It waits at most a second for
// commands that the server has not answered.
func (b *Backend) Close() error {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return nil
	}
	b.closed = true
	close(b.done)
	s := b.session
	b.mu.Unlock()
	if s != nil {
		s.fail(dchannel.ErrBackendClosed)
	}
	idle := make(chan struct{})
	go func() {
		b.running.Wait()
		close(idle)
	}()
	t := time.NewTimer(closeWait)
	defer t.Stop()
	select {
	case <-idle:
	case <-t.C:
	}
	return nil
}

// enter begins something that Close waits for: unless it returns an error,
// b.running.Done must follow.
func (b *Backend) enter(ctx context.Context) error {
	if b.err != nil {
		return b.err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return dchannel.ErrBackendClosed
	}
	b.running.Add(1)
	return nil
}

// Remove deletes channel's head and stream, and its lock. The next log gets a later
// epoch and the next generation a later fence, as these are the server's time in
// microseconds. Who watches the lock gets no hint.
func (b *Backend) Remove(ctx context.Context, channel string) error {
	w := &write{cmd: []any{"UNLINK", b.keys.head(channel)}, last: []byte(b.keys.stream(channel))}
	for _, key := range b.keys.lock(channel) {
		w.cmd = append(w.cmd, key)
	}
	_, err := b.do(ctx, w)
	if err != nil {
		return fmt.Errorf("redis: remove: %w", err)
	}
	return nil
}
