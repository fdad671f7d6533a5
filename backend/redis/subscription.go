package redis

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/dchannel/dchannel"
)

// subscription is one channel, or its lock, on the session's connection. There may be
// 100,000 of them, so it has no goroutine and is small.
type subscription struct {
	s    *session
	key  string // the publish/subscribe channel
	sink dchannel.Sink

	// mu is held around every call of the sink: calls do not overlap, and Close
	// waits for one that is under way. It is taken last, and never with s.mu held.
	mu     sync.Mutex
	closed bool

	// The rest is guarded by s.mu.
	sent bool    // SUBSCRIBE was written to the present connection
	live bool    // and was confirmed
	wait *waiter // the call of Subscribe; nil once it has returned nil
}

// waiter is the call of Subscribe that waits for the first confirmation.
type waiter struct {
	done chan struct{}
	err  error // set before done is closed
}

var errTwice = errors.New("there is a subscription of this channel already")

// Subscribe joins the Backend's connection, or makes it. While the server is away,
// it fails as soon as one attempt to connect has failed.
func (b *Backend) Subscribe(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
	sub, err := b.subscribe(ctx, b.keys.push(channel), sink)
	if err != nil {
		return nil, fmt.Errorf("redis: subscribe: %w", err)
	}
	return sub, nil
}

func (b *Backend) subscribe(ctx context.Context, key string, sink dchannel.Sink) (*subscription, error) {
	if err := b.enter(ctx); err != nil {
		return nil, err
	}
	defer b.running.Done()
	w := &waiter{done: make(chan struct{})}
	sub := &subscription{key: key, sink: sink, wait: w}
	if err := b.join(sub); err != nil {
		return nil, err
	}
	select {
	case <-w.done:
		if w.err != nil {
			return nil, w.err
		}
		return sub, nil
	case <-ctx.Done():
		sub.Close()
		return nil, ctx.Err()
	}
}

// join adds sub to the session, and begins one if there is none.
func (b *Backend) join(sub *subscription) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return dchannel.ErrBackendClosed
	}
	if b.session != nil {
		if added, err := b.session.add(sub); added || err != nil {
			return err
		}
	}
	b.session = newSession(b)
	_, err := b.session.add(sub)
	b.running.Go(b.session.run)
	return err
}

// Close ends the push. UNSUBSCRIBE is left to the session.
func (sub *subscription) Close() {
	sub.mu.Lock()
	was := sub.closed
	sub.closed = true
	sub.mu.Unlock()
	if !was {
		sub.s.remove(sub)
	}
}

// tell calls f with the sink, unless the subscription is closed.
func (sub *subscription) tell(f func(dchannel.Sink)) {
	sub.mu.Lock()
	defer sub.mu.Unlock()
	if !sub.closed {
		f(sub.sink)
	}
}

// end closes sub for a reason that the sink is told.
func (sub *subscription) end(reason error) {
	sub.mu.Lock()
	defer sub.mu.Unlock()
	if !sub.closed {
		sub.closed = true
		sub.sink.State(dchannel.StateFailed, reason)
	}
}
