package memory

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dchannel/dchannel"
)

// Backend is one process's connection to a [Store]. Make one with [New] or
// [Store.Backend].
type Backend struct {
	store *Store

	// down is why nothing reaches the store: closed, cut, or a bad option.
	down        atomic.Pointer[fault]
	dropPushes  atomic.Int64
	loseReplies atomic.Int64

	mu      sync.Mutex
	subs    map[*subscription]struct{}
	watches map[*lockWatch]struct{}
	broken  chan struct{} // closed by Cut and Close; Heal makes a new one
}

// fault is why a backend's calls fail.
type fault struct {
	err   error // what they return
	cause error // the same without a sentinel
	final bool
}

var (
	_ dchannel.Backend            = (*Backend)(nil)
	_ dchannel.ImmediatePublisher = (*Backend)(nil)
)

// New returns a backend on a store of its own.
func New(opts ...Option) *Backend { return NewStore(opts...).Backend() }

// Backend returns a new backend on the store: another process, as it were. It
// costs nothing until it subscribes.
func (s *Store) Backend() *Backend {
	b := &Backend{store: s,
		subs: make(map[*subscription]struct{}), watches: make(map[*lockWatch]struct{}), broken: make(chan struct{}),
	}
	if s.badOption != nil {
		b.down.Store(&fault{err: s.badOption, final: true})
	}
	return b
}

// Store returns the store that b works on.
func (b *Backend) Store() *Store { return b.store }

// Publish implements [dchannel.Backend]. It blocks only while the store is paused.
func (b *Backend) Publish(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
	if err := b.ready(ctx); err != nil {
		return dchannel.Position{}, err
	}
	since := b.began(f.Age)
	pos, err := b.store.append(channel, f, since, false)
	if err == errPaused { //nolint:errorlint // our own, never wrapped
		return b.publishLater(ctx, channel, f, since)
	}
	if b.replyLost() {
		return dchannel.Position{}, errReplyLost
	}
	return pos, err
}

// PublishNow implements [dchannel.ImmediatePublisher]: ok is false while the
// store is paused and when b is cut or closed.
func (b *Backend) PublishNow(channel string, f dchannel.Frame) (pos dchannel.Position, ok bool, err error) {
	if b.down.Load() != nil {
		return pos, false, nil
	}
	pos, err = b.store.append(channel, f, b.began(f.Age), false)
	if err == errPaused { //nolint:errorlint // our own, never wrapped
		return pos, false, nil
	}
	if b.replyLost() {
		return dchannel.Position{}, true, errReplyLost
	}
	return pos, true, err
}

// MarkClosed implements [dchannel.Backend]. keep is rounded up to a second, and
// then to a whole millisecond.
func (b *Backend) MarkClosed(ctx context.Context, channel string, id dchannel.ID, keep time.Duration) (dchannel.Position, error) {
	return call(ctx, b, write, func(force bool) (dchannel.Position, error) {
		return b.store.markClosed(channel, id, millis(max(keep, time.Second)), force)
	})
}

// Read implements [dchannel.Backend].
func (b *Backend) Read(ctx context.Context, channel string, after dchannel.Position, limit int) (dchannel.Page, error) {
	return call(ctx, b, read, func(force bool) (dchannel.Page, error) {
		return b.store.read(channel, after, limit, force)
	})
}

// Heads implements [dchannel.Backend].
func (b *Backend) Heads(ctx context.Context, channels []string) ([]dchannel.Head, error) {
	return call(ctx, b, read, func(force bool) ([]dchannel.Head, error) {
		return b.store.heads(channels, force)
	})
}

// Subscribe implements [dchannel.Backend].
func (b *Backend) Subscribe(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
	return call(ctx, b, read, func(force bool) (dchannel.Subscription, error) {
		return b.subscribe(channel, sink, force)
	})
}

// Remove implements [dchannel.Backend]. Subscriptions stay.
func (b *Backend) Remove(ctx context.Context, channel string) error {
	_, err := call(ctx, b, write, func(force bool) (struct{}, error) {
		return struct{}{}, b.store.remove(channel, force)
	})
	return err
}

// Close implements [dchannel.Backend]. The store and its other backends go on.
func (b *Backend) Close() error {
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	was := b.down.Swap(&fault{err: dchannel.ErrBackendClosed, cause: errClosed, final: true})
	if was == nil {
		close(b.broken)
	}
	for sub := range b.subs {
		sub.end(func() { sub.sink.State(dchannel.StateFailed, dchannel.ErrBackendClosed) })
	}
	clear(b.subs)
	for w := range b.watches {
		w.resume()
		w.end()
	}
	clear(b.watches)
	return nil
}

// ready returns why a call cannot begin.
func (b *Backend) ready(ctx context.Context) error {
	if f := b.down.Load(); f != nil {
		return f.err
	}
	return ctx.Err()
}

// ageSlack is how much older an age may be than its value says: the caller may have
// been held up between reading its clock and calling. (Without it, a busy machine
// appended a frame twice after a few thousand retries.)
const ageSlack = time.Second

// began returns when the first attempt began, in the store's time; 0 if this is it.
// It errs to the early side.
func (b *Backend) began(age time.Duration) int64 {
	if age <= 0 {
		return 0
	}
	return b.store.now() - millis(age) - millis(ageSlack)
}

// errReplyLost is what LoseReplies makes of a reply.
var errReplyLost = fmt.Errorf("%w: memory: the connection was lost before the reply came", dchannel.ErrUncertain)

func (b *Backend) replyLost() bool { return take(&b.loseReplies) }

// take uses up one of n, if there is one.
func take(n *atomic.Int64) bool {
	for {
		have := n.Load()
		if have <= 0 {
			return false
		}
		if n.CompareAndSwap(have, have-1) {
			return true
		}
	}
}
