package dchannel

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/dchannel/dchannel/internal/frame"
)

// handle is a Channel's inside: its life cycle here, its listening in listen.go.
type handle struct {
	name    string
	backend Backend
	o       *options
	invalid error // why no call can succeed

	mu        sync.Mutex // before feed.mu, where both are needed
	l         *local     // from the first use until the end
	f         *feed      // from the attachment on
	attachErr error      // of the latest attempt
	stopDone  context.CancelFunc

	detached atomic.Bool
	closed   atomic.Bool

	endMu  sync.Mutex // guards ended; the feed takes it while it holds its own lock
	ended  chan struct{}
	isOver bool
	left   chan struct{} // closed by detach; made on demand

	lockMu sync.Mutex
	hold   *Hold // the latest; it may be over

	spot
	reading atomic.Pointer[reader]

	async     asyncState
	published atomic.Uint64
	received  atomic.Uint64
	lost      atomic.Uint64
	unknown   atomic.Uint64
}

func newHandle(name string, b Backend, o *options) *handle {
	return &handle{
		name: name, backend: b, o: o,
		invalid: errors.Join(checkName(name), checkBackend(b), o.err),
	}
}

// wrap says once what was asked of which channel.
func (h *handle) wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("dchannel: %s %q: %w", op, h.name, err)
}

// usable returns the channel's shared part.
func (h *handle) usable() (*local, error) {
	switch {
	case h.invalid != nil:
		return nil, h.invalid
	case h.detached.Load():
		return nil, ErrDetached
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.detached.Load():
		return nil, ErrDetached
	case h.closed.Load():
		return nil, ErrChanClosed
	}
	if h.l == nil {
		h.l = acquire(h.backend, h.name)
	}
	return h.l, nil
}

// attach makes the handle a listener, if it is none yet.
func (h *handle) attach(ctx context.Context) (*feed, error) {
	h.mu.Lock()
	f := h.f
	h.mu.Unlock()
	if f != nil {
		return f, nil
	}
	l, err := h.usable()
	if err != nil {
		return nil, err
	}
	ctx, done := context.WithTimeoutCause(ctx, h.o.timeout, errTimeout)
	defer done()
	f = l.upstream()
	if err = f.await(ctx); err == nil {
		h.mu.Lock()
		f.mu.Lock()
		if first := h.f == nil && !h.detached.Load(); first {
			h.f = f
			f.add(h)
		} else {
			f.mu.Unlock()
			f, err = h.f, nil
			if f == nil {
				err = ErrDetached
			}
			h.mu.Unlock()
			l.leave(f)
			return f, err
		}
		over := f.phase == ended
		f.mu.Unlock()
		h.mu.Unlock()
		if over {
			h.free()
		}
		return f, nil
	}
	l.leave(f)
	h.mu.Lock()
	h.attachErr = err
	h.mu.Unlock()
	return nil, err
}

var errTimeout = errors.New("gave up after the time of WithTimeout")

// await waits until a handle can be added.
func (f *feed) await(ctx context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for !f.ready() {
		if f.changed == nil {
			f.changed = make(chan struct{})
		}
		changed := f.changed
		f.mu.Unlock()
		select {
		case <-changed:
			f.mu.Lock()
			continue
		case <-ctx.Done():
		}
		f.mu.Lock()
		switch {
		case context.Cause(ctx) != errTimeout: //nolint:errorlint // this very value
			if f.reason != nil {
				return fmt.Errorf("%w (%w)", ctx.Err(), f.reason)
			}
			return ctx.Err()
		case f.reason == nil:
			return fmt.Errorf("%w: no answer: %w", ErrUnavailable, errTimeout)
		case errors.Is(f.reason, ErrUnavailable):
			return fmt.Errorf("%w: %w", f.reason, errTimeout)
		}
		return fmt.Errorf("%w: %w: %w", ErrUnavailable, errTimeout, certainly(f.reason))
	}
	if f.phase == failed {
		return f.reason
	}
	return nil
}

// add makes h a listener. f.mu is held, and f is ready.
func (f *feed) add(h *handle) {
	f.limit = max(f.limit, h.o.buffer)
	f.handles = append(f.handles, h)
	switch h.o.start.kind {
	case fromNow:
		h.end = f.trk.cursor
		f.enring(h, f.end())
	case fromOldest:
		h.trk = &tracker{fresh: true}
	case fromPosition:
		h.end = cursor{Position: h.o.start.pos}
		h.trk = &tracker{cursor: h.end}
	}
	h.at.store(h.end.Position)
	if f.phase == ended {
		h.sawClose()
	}
}

// drop ends h's listening. f.mu is held.
func (f *feed) drop(h *handle) {
	if h.inRing {
		f.unring(h)
	}
	for i, x := range f.handles {
		if x == h {
			last := len(f.handles) - 1
			f.handles[i] = f.handles[last]
			f.handles[last] = nil
			f.handles = f.handles[:last]
			break
		}
	}
	if h.asleep {
		for i, x := range f.sleeping {
			if x == h {
				f.sleeping = append(f.sleeping[:i:i], f.sleeping[i+1:]...)
				break
			}
		}
	}
}

func (h *handle) publish(ctx context.Context, msg any) error {
	l, r, err := h.record(ctx, msg)
	if err != nil {
		return err
	}
	err = l.pub.send(ctx, h, r)
	switch {
	case err == nil:
		h.published.Add(1)
	case errors.Is(err, ErrChanClosed):
		h.sawClose()
	}
	return err
}

func (h *handle) publishAsync(ctx context.Context, msg any) error {
	l, r, err := h.record(ctx, msg)
	if err != nil {
		return err
	}
	return l.pub.sendAsync(ctx, h, r)
}

// record encodes msg, and checks all that can be checked before it is sent.
func (h *handle) record(ctx context.Context, msg any) (l *local, r frame.Record, err error) {
	if l, err = h.usable(); err != nil {
		return l, r, err
	}
	if h.closed.Load() {
		return l, r, ErrChanClosed
	}
	if err = ctx.Err(); err != nil {
		return l, r, err
	}
	if r, err = encode(h.o.codec, msg, nil); err != nil {
		return l, r, err
	}
	if n := len(r.Payload); n > h.o.maxMessage {
		return l, r, fmt.Errorf("%w: %d bytes, the limit is %d", ErrTooLarge, n, h.o.maxMessage)
	}
	if n := len(r.Payload) + frame.Overhead(r) + 1; n > l.s.maxFrame {
		return l, r, fmt.Errorf("%w: %d bytes, framed, the backend's limit is %d", ErrTooLarge, n, l.s.maxFrame)
	}
	return l, r, nil
}

func (h *handle) close(ctx context.Context) error {
	l, err := h.usable()
	if h.closed.Load() || errors.Is(err, ErrChanClosed) {
		return nil
	}
	if err != nil {
		return err
	}
	err = l.pub.close(ctx, h)
	if err == nil || errors.Is(err, ErrChanClosed) {
		err = nil
		h.closeLock(ctx)
		h.sawClose()
		h.mu.Lock()
		attached := h.f != nil
		h.mu.Unlock()
		if !attached {
			h.free()
		}
	}
	return err
}

// sawClose notes that the channel is closed.
func (h *handle) sawClose() {
	h.closed.Store(true)
	h.signal()
	h.dropHold(errClosedUnder)
}

// signal ends Done.
func (h *handle) signal() {
	h.endMu.Lock()
	defer h.endMu.Unlock()
	if !h.isOver {
		h.isOver = true
		if h.ended != nil {
			close(h.ended)
		}
	}
}

// finished is called by the feed, under its lock, when nothing more will come.
func (h *handle) finished(p phase) {
	if p == ended {
		h.sawClose()
	}
}

func (h *handle) isClosed() bool {
	if h.closed.Load() {
		return true
	}
	_, _ = h.attach(context.Background()) // Status has the error
	return h.closed.Load()
}

func (h *handle) done() <-chan struct{} {
	h.endMu.Lock()
	if h.ended == nil {
		h.ended = make(chan struct{})
		if h.isOver {
			close(h.ended)
		}
	}
	over, ch := h.isOver, h.ended
	h.endMu.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	if !over && h.f == nil && h.stopDone == nil && h.invalid == nil && !h.detached.Load() {
		ctx, cancel := context.WithCancel(context.Background())
		h.stopDone = cancel
		go func() {
			defer cancel()
			var b backoff
			for {
				_, err := h.attach(ctx)
				if err == nil || final(err) || !b.sleep(ctx) {
					return
				}
			}
		}()
	}
	return ch
}

// free gives the shared parts back. What is left to read stays with the handle.
func (h *handle) free() {
	h.mu.Lock()
	l, f := h.l, h.f
	h.l = nil
	h.mu.Unlock()
	if l == nil {
		return
	}
	if f != nil {
		l.leave(f)
	}
	l.release()
}

func (h *handle) detach() {
	if h.detached.Swap(true) {
		return
	}
	h.mu.Lock()
	f := h.f
	if h.stopDone != nil {
		h.stopDone()
	}
	if f != nil {
		f.mu.Lock()
		f.drop(h)
		f.mu.Unlock()
	}
	h.mu.Unlock()
	h.rouse()
	h.signal()
	h.endMu.Lock()
	if h.left != nil {
		close(h.left)
	}
	h.endMu.Unlock()
	h.free()
}
