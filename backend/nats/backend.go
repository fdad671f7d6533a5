package nats

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	natsgo "github.com/nats-io/nats.go"

	"github.com/dchannel/dchannel"
)

// Backend keeps channels in one JetStream stream. Make it with [New].
type Backend struct {
	conn  *natsgo.Conn
	opt   options
	names names
	wire  *wire

	maxFrame atomic.Int64
	// life counts the connection's lives: what was learnt in an earlier one may
	// be about a server that has lost its newest messages since.
	life  atomic.Uint64
	clock atomic.Pointer[clock]

	startMu  sync.Mutex
	running  bool        // goroutines were started
	starting *attempt    // under way
	verified atomic.Bool // the stream is there and as it should be
	looked   chan struct{}
	memory   memory

	chansMu sync.Mutex
	chans   map[string]*channel

	subsMu sync.RWMutex
	subs   map[string][]*subscription // by subject: one, or another one while it is being closed
	pushes chan *natsgo.Msg

	trims chan trim
	fence atomic.Uint64 // the highest that this process has seen of any lock
	// comparing says that the watched locks are being looked at.
	comparing atomic.Bool

	closeOnce sync.Once
	closed    chan struct{}
	closeErr  error // set before closed is closed
	work      sync.WaitGroup
}

var (
	_ dchannel.Backend = (*Backend)(nil)
	_ dchannel.Checker = (*Backend)(nil)
	_ dchannel.Locker  = (*Backend)(nil)
)

// New returns a backend on conn, which stays the caller's: Close does not close it.
// Nothing is sent before the first call that needs it, which also makes the stream if
// there is none.
//
// conn must be one that never gives up: nats.MaxReconnects(-1). One that does,
// which is nats.go's default (60 attempts, about two minutes), is refused by the
// first call with dchannel.ErrInvalidOption, as it would end every channel of this
// process for good in an outage that is a little longer.
func New(conn *natsgo.Conn, opts ...Option) *Backend {
	b := &Backend{conn: conn, opt: defaults(), closed: make(chan struct{}), looked: make(chan struct{}),
		chans: make(map[string]*channel), subs: make(map[string][]*subscription),
		pushes: make(chan *natsgo.Msg, pushBuffer), trims: make(chan trim, 1024)}
	for _, o := range opts {
		o(&b.opt)
	}
	b.names = namesOf(b.opt.namespace)
	b.maxFrame.Store(defaultMaxPayload - overhead)
	if conn == nil {
		b.opt.require(false, "New(nil): want a connection")
		return b
	}
	b.opt.require(conn.Opts.AllowReconnect, "the connection does not reconnect: connect without nats.NoReconnect")
	b.opt.require(!conn.Opts.AllowReconnect || conn.Opts.MaxReconnect < 0,
		"the connection gives up after %d attempts to reconnect: connect with nats.MaxReconnects(-1)", conn.Opts.MaxReconnect)
	b.noteMaxPayload(conn.MaxPayload())
	return b
}

// Publish implements [dchannel.Backend].
func (b *Backend) Publish(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
	if err := b.ready(ctx); err != nil {
		return dchannel.Position{}, err
	}
	if len(f.Data) > b.MaxFrame() {
		return dchannel.Position{}, fmt.Errorf("%w: nats: a frame of %d bytes, and the server takes %d", dchannel.ErrTooLarge, len(f.Data), b.MaxFrame())
	}
	return b.append(ctx, channel, dchannel.Entry{ID: f.ID, Count: f.Count, Data: f.Data}, f.Age, 0)
}

// MarkClosed implements [dchannel.Backend]. keep is rounded up to whole seconds.
// Entries below the marker live as long as they would have anyway, which is the
// retention and the idle expiry together from when they were accepted: a longer
// keep keeps the marker only.
func (b *Backend) MarkClosed(ctx context.Context, channel string, id dchannel.ID, keep time.Duration) (dchannel.Position, error) {
	return b.append(ctx, channel, dchannel.Entry{ID: id, Count: 1, Closed: true}, 0, keep)
}

// CheckEvery implements [dchannel.Checker]: a server drops pushes that a connection
// is too slow for, or that a route in a cluster loses, and says nothing.
func (b *Backend) CheckEvery() time.Duration { return b.opt.probeInterval }

// Remove implements [dchannel.Backend].
func (b *Backend) Remove(ctx context.Context, channel string) error {
	return b.retryMissing(ctx, func() error { return b.remove(ctx, channel) })
}

func (b *Backend) remove(ctx context.Context, name string) error {
	for _, subject := range []string{b.names.log + token(name), b.names.lock(name)} {
		if err := b.purge(ctx, subject, 0); err != nil {
			return err
		}
	}
	b.remembered(name).invalidate()
	// Others ask only for what is new since they last asked: tell them that
	// something went. See Heads.
	m := natsgo.NewMsg(b.names.removed)
	m.Header[headerTTL] = []string{"3600s"}
	m.Data = []byte("dchannel removed " + token(name) + "\n")
	_, err := b.publish(ctx, m)
	return err
}

// Close implements [dchannel.Backend].
func (b *Backend) Close() error {
	b.shut(errClosed)
	// Everything ends at once, except a write of the client to a dead peer.
	done := make(chan struct{})
	go func() { b.work.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(2 * time.Second):
	}
	return nil
}

// shut ends the backend, for Close or because the connection was closed.
func (b *Backend) shut(err error) {
	b.closeOnce.Do(func() {
		b.startMu.Lock()
		b.closeErr = err
		close(b.closed) // under startMu: nothing is started afterwards
		running := b.running
		b.startMu.Unlock()
		if !running {
			return
		}
		for _, s := range b.subscriptions() {
			s.state(dchannel.StateFailed, err)
			s.Close()
		}
		b.wire.end(err) // after what those have queued
	})
}

// isClosed returns the error of calls after Close, or nil.
func (b *Backend) isClosed() error {
	select {
	case <-b.closed:
		return b.closeErr
	default:
		return nil
	}
}

// spawn runs f aside, unless the backend is closed.
func (b *Backend) spawn(f func()) bool {
	b.startMu.Lock()
	defer b.startMu.Unlock()
	if b.isClosed() != nil {
		return false
	}
	b.work.Go(f)
	return true
}

// retryMissing runs f on a stream that is there, and once more if it turns out that
// it is not.
func (b *Backend) retryMissing(ctx context.Context, f func() error) error {
	for again := true; ; again = false {
		if err := b.ready(ctx); err != nil {
			return err
		}
		err := f()
		if err == nil {
			return nil
		}
		if closed := b.isClosed(); closed != nil && !isUncertain(err) {
			return closed
		}
		if !streamMissing(err) && !errors.Is(err, errNoIncarnation) {
			return mapError(err, false)
		}
		b.verified.Store(false)
		if !again {
			return mapError(err, false)
		}
	}
}
