package dchannel

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dchannel/dchannel/internal/frame"
)

// publisher is the group commit of one channel in this process. While one frame is
// on its way to the backend, further messages gather in the next one: no timer, no
// delay when idle, one round trip for many messages when busy, and the order kept.
// The idea is the group commit of database logs (Gawlick and Kinkade, "Varieties of
// Concurrency Control in IMS/VS Fast Path", 1985).
type publisher struct {
	local *local

	// busy: there is a queue or a flight, so what comes now has to line up.
	busy atomic.Bool

	mu    sync.Mutex
	queue []*batch
	bytes int           // in the queue and under way
	space chan struct{} // closed when bytes fall; made on demand
	free  []*waiter
	// down is why the batch before could not be delivered in its time.
	down error
}

// softFrame is the size at which a frame takes no further message. Measured on
// Redis: larger ones bring nothing more.
const softFrame = 128 << 10

// batch becomes a frame, or a close.
type batch struct {
	id      ID
	data    []byte
	count   int
	closing bool
	keep    time.Duration // of a close
	timeout time.Duration // the longest of those who wait

	waiters []*waiter
	async   []asyncShare
	// queued is when its first message came: the time of WithTimeout begins there.
	queued time.Time
	// began is when the first attempt did; zero: not yet.
	began time.Time
	// sent: an attempt is under way, or one had an unknown outcome. Until then a
	// message can still be taken back.
	sent bool
	last error // of the latest attempt
	// giveUp ends the attempt that is under way, if one is.
	giveUp context.CancelFunc
}

// waiter is a caller that waits for its message's outcome.
type waiter struct {
	done   chan error // 1 buffered
	off, n int        // its record in batch.data
	gone   bool       // the caller left
}

// maxFree bounds how many waiters a publisher keeps for reuse.
const maxFree = 64

// waiter returns one to use. p.mu is held.
//
// They are kept here and not in a sync.Pool because a channel made in one
// testing/synctest bubble must not come up in another.
func (p *publisher) waiter() *waiter {
	n := len(p.free)
	if n == 0 {
		return &waiter{done: make(chan error, 1)}
	}
	w := p.free[n-1]
	p.free = p.free[:n-1]
	return w
}

// asyncShare counts a handle's asynchronous messages in a batch.
type asyncShare struct {
	h *handle
	n int
}

// send publishes r for h and waits for the outcome.
func (p *publisher) send(ctx context.Context, h *handle, r frame.Record) error {
	s := p.local.s
	if now := s.immediate; now != nil && !p.busy.Load() {
		data := frame.Append(frame.Begin(make([]byte, 0, 1+len(r.Payload)+frame.Overhead(r))), r)
		b := batch{id: NewID(), data: data, count: 1}
		if _, ok, err := now.PublishNow(p.local.name, Frame{ID: b.id, Count: 1, Data: data}); ok {
			if !errors.Is(err, ErrUncertain) && !errors.Is(err, ErrUnavailable) {
				return err
			}
			return p.retry(ctx, h, b, err)
		}
	}
	p.mu.Lock()
	w := p.waiter()
	var b *batch
	b, w.n = p.add(r, h.o.timeout)
	w.off = len(b.data) - w.n
	b.waiters = append(b.waiters, w)
	p.launch()
	p.mu.Unlock()
	return p.await(ctx, b, w)
}

// retry lines b up, whose first attempt, outside the queue, ended with err.
func (p *publisher) retry(ctx context.Context, h *handle, b batch, err error) error {
	p.mu.Lock()
	w := p.waiter()
	w.off, w.n = 1, len(b.data)-1
	b.began, b.last, b.sent = time.Now(), err, errors.Is(err, ErrUncertain)
	b.queued = b.began
	b.timeout = h.o.timeout
	b.waiters = []*waiter{w}
	p.queue = append(p.queue, &b)
	p.bytes += w.n
	p.launch()
	p.mu.Unlock()
	return p.await(ctx, &b, w)
}

// sendAsync queues r for h; it waits only for room.
func (p *publisher) sendAsync(ctx context.Context, h *handle, r frame.Record) error {
	size := len(r.Payload) + frame.Overhead(r)
	p.mu.Lock()
	for p.bytes > 0 && p.bytes+size > h.o.queue {
		if p.space == nil {
			p.space = make(chan struct{})
		}
		space := p.space
		p.mu.Unlock()
		select {
		case <-space:
		case <-ctx.Done():
			return ctx.Err()
		}
		p.mu.Lock()
	}
	defer p.mu.Unlock()
	b, _ := p.add(r, h.o.timeout)
	if n := len(b.async); n > 0 && b.async[n-1].h == h {
		b.async[n-1].n++
	} else {
		b.async = append(b.async, asyncShare{h, 1})
	}
	h.async.begin()
	p.launch()
	return nil
}

// close marks the channel closed, behind everything that is queued.
func (p *publisher) close(ctx context.Context, h *handle) error {
	p.mu.Lock()
	w := p.waiter()
	b := &batch{id: NewID(), queued: time.Now(), closing: true, keep: h.o.closeKeep, timeout: h.o.timeout, waiters: []*waiter{w}}
	p.queue = append(p.queue, b)
	p.launch()
	p.mu.Unlock()
	return p.await(ctx, b, w)
}

// add appends r to the last batch of the queue, or to a new one, and returns the
// batch and r's size in it. p.mu is held.
func (p *publisher) add(r frame.Record, timeout time.Duration) (b *batch, n int) {
	size := len(r.Payload) + frame.Overhead(r)
	if n := len(p.queue); n > 0 {
		b = p.queue[n-1]
	}
	limit := min(softFrame, p.local.s.maxFrame)
	if b == nil || b.closing || !b.began.IsZero() || len(b.data)+size > limit {
		b = &batch{id: NewID(), queued: time.Now()}
		b.data = frame.Begin(make([]byte, 0, max(size+1, 256)))
		p.queue = append(p.queue, b)
	}
	before := len(b.data)
	b.data = frame.Append(b.data, r)
	b.count++
	b.timeout = max(b.timeout, timeout)
	n = len(b.data) - before
	p.bytes += n
	return b, n
}

// launch starts the flights if none are under way. p.mu is held.
func (p *publisher) launch() {
	if !p.busy.Swap(true) {
		// The flights hold a reference: what is queued goes out, even if its handle
		// is detached meanwhile.
		p.local.retain()
		go p.fly()
	}
}

// await waits for the outcome of w in b, or for the end of ctx.
func (p *publisher) await(ctx context.Context, b *batch, w *waiter) error {
	select {
	case err := <-w.done:
		p.mu.Lock()
		if len(p.free) < maxFree {
			p.free = append(p.free, w)
		}
		p.mu.Unlock()
		return err
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	w.gone = true
	if b.sent && b.giveUp != nil && b.abandoned() {
		// Nobody else waits: end the attempt, and hear whether it got anywhere.
		b.giveUp()
		p.mu.Unlock()
		err, known := w.outcome()
		p.mu.Lock()
		if known {
			return gaveUp(ctx, err)
		}
	}
	select {
	case err := <-w.done: // just now
		return err
	default:
	}
	switch {
	case b.sent && b.last != nil:
		return fmt.Errorf("%w: %w (%w)", ErrUncertain, ctx.Err(), certainly(b.last))
	case b.sent:
		return fmt.Errorf("%w: %w", ErrUncertain, ctx.Err())
	}
	p.takeBack(b, w)
	if b.last != nil {
		return fmt.Errorf("%w (%w)", ctx.Err(), b.last)
	}
	return ctx.Err()
}

// grace is how long a caller whose context has ended waits to hear what became of the
// attempt that was ended with it: less than the 100 ms within which it has to return.
const grace = 50 * time.Millisecond

func (w *waiter) outcome() (err error, known bool) {
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case err = <-w.done:
		return err, true
	case <-t.C:
		return nil, false
	}
}

// gaveUp is the error of a call whose context ended before the outcome err was known;
// nil is nil.
func gaveUp(ctx context.Context, err error) error {
	switch {
	case err == nil || errors.Is(err, ctx.Err()) || errors.Is(err, ErrChanClosed):
		return err
	case errors.Is(err, ErrUncertain):
		return fmt.Errorf("%w: %w (%w)", ErrUncertain, ctx.Err(), certainly(err))
	case errors.Is(err, context.Canceled): // our own
		return ctx.Err()
	}
	return fmt.Errorf("%w (%w)", ctx.Err(), err)
}

// takeBack removes w's message from b, which was surely not sent.
func (p *publisher) takeBack(b *batch, w *waiter) {
	for i, x := range b.waiters {
		if x == w {
			b.waiters = append(b.waiters[:i:i], b.waiters[i+1:]...)
			break
		}
	}
	if b.closing {
		return
	}
	// A copy: the backend may hold the old bytes from an attempt that failed.
	b.data = append(append(make([]byte, 0, len(b.data)), b.data[:w.off]...), b.data[w.off+w.n:]...)
	b.count--
	for _, x := range b.waiters {
		if x.off > w.off {
			x.off -= w.n
		}
	}
	p.freed(w.n)
}

// freed notes that room has been made. p.mu is held.
func (p *publisher) freed(n int) {
	p.bytes -= n
	if p.space != nil {
		close(p.space)
		p.space = nil
	}
}
