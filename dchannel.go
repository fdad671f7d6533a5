// Package dchannel is a channel that spans processes: who knows its name publishes
// to it, listens to it, and closes it for everyone, on the Redis, NATS or etcd that a
// deployment has already, or in memory.
//
//	b := redis.New(client)
//	ch, err := dchannel.Open(ctx, "orders", b)
//	defer ch.Detach()
//	err = ch.Publish(ctx, "hello")      // nil: it is in the channel's order for good
//	v, err := ch.Listen(ctx)            // every handle, in every process, gets every message
//	err = ch.Close()                    // every Listen, everywhere, returns ErrChanClosed
//
// # What is promised
//
// One total order for each channel, the same for every listener. Every handle gets
// every message that is accepted after it attached, once, over cuts, restarts and
// replays. If messages cannot be had any more (the backend has lost them, or the
// listener was away for longer than they are retained), Listen says so, at the very
// place of the gap, with a [LostError]. Messages are never lost silently. A close is
// the last record of the same order: what was accepted before it is delivered first,
// nothing comes after it, and who attaches later learns of it.
//
// Each promise has a name (ExactlyOnce, CloseDrains, …), a case in the suite of
// package conformance, and a broken backend that the case catches. docs/guarantees.md
// lists them.
//
// # Handles
//
// A [Channel] is a handle: one listener. Several goroutines may call Listen on it and
// share its messages, as receivers share a Go channel; who wants every message twice
// opens two handles. They are cheap: all handles of a channel in one process share
// one subscription and one buffer.
//
// All methods may be called from any number of goroutines.
package dchannel

import (
	"context"
	"errors"
	"fmt"
	"iter"
)

// DChannel is a distributed channel as most code needs it. [*Channel] implements it.
type DChannel interface {
	// Publish sends msg to everyone who listens.
	Publish(ctx context.Context, msg any) error
	// Listen returns the next message.
	Listen(ctx context.Context) (any, error)
	// Close closes the channel for everyone.
	Close() error
	// CloseLockedUntil ends the tracking of the channel's lock duration.
	CloseLockedUntil() error
	// IsClosed tells whether the channel is closed.
	IsClosed() bool
}

var _ DChannel = (*Channel)(nil)

// Channel is a handle on a distributed channel. Make one with [Open] or [New].
// A handle that is no longer used must be detached, if the channel was not closed.
type Channel struct{ h *handle }

// New returns a handle on the named channel. It does nothing yet: the handle attaches
// at the first call that needs it (Listen, Messages, IsClosed, Done), and listens
// from then on. Publish and Close need no attachment. What is wrong with the
// arguments is the error of the first call.
func New(name string, b Backend, opts ...Option) *Channel {
	return &Channel{newHandle(name, b, newOptions(opts))}
}

// Open returns an attached handle on the named channel: everything that anyone
// publishes from now on reaches it. It waits until the backend has confirmed that,
// for as long as ctx and WithTimeout allow. A channel that is closed already can be
// opened: IsClosed tells, and Listen returns ErrChanClosed.
//
// Errors: ErrInvalidName, ErrInvalidOption, ErrUnavailable, ErrRefused,
// ErrBackendClosed, or that of ctx.
func Open(ctx context.Context, name string, b Backend, opts ...Option) (*Channel, error) {
	c := New(name, b, opts...)
	if _, err := c.h.attach(ctx); err != nil {
		c.h.detach()
		return nil, c.h.wrap("open", err)
	}
	return c, nil
}

// Remove deletes at once everything that the backend holds for the named channel:
// messages, order, close marker. Normally all of it expires by itself. Listeners that
// have not read everything are told of a loss.
func Remove(ctx context.Context, name string, b Backend) error {
	err := errors.Join(checkName(name), checkBackend(b))
	if err == nil {
		err = b.Remove(ctx, name)
	}
	if err != nil {
		return fmt.Errorf("dchannel: remove %q: %w", name, err)
	}
	return nil
}

// Name returns the channel's name.
func (c *Channel) Name() string { return c.h.name }

// Publish sends msg to everyone who listens. A string arrives as a string, a []byte
// as a []byte, anything else as what the codec makes of it. The caller may reuse msg
// when Publish has returned.
//
// nil means that the backend has taken the message into the channel's order. While
// the backend is unavailable Publish tries again, without ever sending twice, until
// ctx ends or the time of WithTimeout is over. An error that is ErrUncertain means
// that the message may or may not be in the order; every other error means that it
// surely is not, and was not sent in part: ErrChanClosed, ErrTooLarge, ErrCodec,
// ErrUnavailable, ErrRefused, ErrDetached, ErrBackendClosed, ErrInvalidName,
// ErrInvalidOption, or that of ctx.
//
// Messages from one goroutine keep their order. Concurrent messages of one process
// travel together (group commit), so many goroutines publish much faster than one.
func (c *Channel) Publish(ctx context.Context, msg any) error {
	return c.h.wrap("publish", c.h.publish(ctx, msg))
}

// PublishAsync queues msg, in order with what this goroutine publishes otherwise,
// and returns. It waits only while more than WithQueue's bytes are queued; an error
// means that the message was not queued. Flush tells what became of the messages.
func (c *Channel) PublishAsync(ctx context.Context, msg any) error {
	return c.h.wrap("publish", c.h.publishAsync(ctx, msg))
}

// Flush waits until the outcome of every PublishAsync of this handle is known. The
// error, if any, tells how many failed since the last Flush, and wraps the first
// failure.
func (c *Channel) Flush(ctx context.Context) error {
	return c.h.wrap("flush", c.h.async.flush(ctx))
}

// Listen returns the next message: a string, a []byte that belongs to the caller, or
// what the codec decodes. It blocks until there is one. While the backend is away it
// waits, and goes on where it was when the backend is back.
//
// It returns ErrChanClosed when the channel was closed and everything before the close
// has been returned; a *LostError (ErrLost) where messages are missing, and ErrCodec
// for a message that cannot be decoded, after both of which the next call goes on;
// the context's own error, not wrapped, when ctx ends; ErrDetached; or, where the
// handle could not attach, what Open would return.
func (c *Channel) Listen(ctx context.Context) (any, error) {
	m, err := c.h.reader().next(ctx)
	if err != nil {
		return nil, err
	}
	return m.Value()
}

// Next is Listen for those who want more than the value.
func (c *Channel) Next(ctx context.Context) (Message, error) {
	return c.h.reader().next(ctx)
}

// Messages returns an iterator over the messages, which ends when the channel is
// closed. An error that is a *LostError, or ErrCodec, is yielded at its place, and the
// iteration goes on; after any other error, ctx's included, it is over.
func (c *Channel) Messages(ctx context.Context) iter.Seq2[Message, error] {
	return func(yield func(Message, error) bool) {
		for {
			m, err := c.Next(ctx)
			if errors.Is(err, ErrChanClosed) {
				return
			}
			goesOn := err == nil || errors.Is(err, ErrLost) || errors.Is(err, ErrCodec)
			if !yield(m, err) || !goesOn {
				return
			}
		}
	}
}

// Close closes the channel for everyone, behind everything that this process has
// published on it before: every Listen, in every process, returns ErrChanClosed when
// it has returned what came before. The close is remembered for the time of
// WithCloseKeep. Closing a closed channel is nil.
//
// Close tries for the time of WithTimeout. Its error is ErrUncertain if the channel
// may or may not be closed now; otherwise it surely is not, by this call.
func (c *Channel) Close() error { return c.CloseContext(context.Background()) }

// CloseContext is Close with a context.
func (c *Channel) CloseContext(ctx context.Context) error {
	return c.h.wrap("close", c.h.close(ctx))
}

// CloseLockedUntil ends the tracking of the channel's lock duration. It is nil if
// none was started.
func (c *Channel) CloseLockedUntil() error { return nil }

// IsClosed tells whether the channel is closed, also if there are messages left to
// Listen to. A handle that is not attached yet attaches first, for at most the time
// of WithTimeout; if that fails it returns false, and Status has the reason. Closed
// stays closed.
func (c *Channel) IsClosed() bool {
	return c.h.isClosed()
}

// Done returns a channel that is closed when this one is, or when the handle is
// detached. IsClosed tells which. A handle that is not attached yet begins to attach.
func (c *Channel) Done() <-chan struct{} {
	return c.h.done()
}

// Detach ends this handle and leaves the channel open for the others. Blocked calls
// return ErrDetached. Messages of PublishAsync still go out: Detach waits for them as
// Flush does, for at most the time of WithTimeout, and returns the same error.
// Detaching again is nil.
func (c *Channel) Detach() error {
	ctx, done := context.WithTimeout(context.Background(), c.h.o.timeout)
	defer done()
	c.h.detach()
	return c.h.wrap("detach", c.h.async.flush(ctx))
}

// Status describes the handle at this moment.
func (c *Channel) Status() Status {
	return c.h.status()
}
