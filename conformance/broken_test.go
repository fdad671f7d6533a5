package conformance

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/frame"
)

// broken is the memory backend with some methods replaced.
type broken struct {
	dchannel.Backend // what works
	lab              *lab
	short            bool // made by Short's functions

	publish   func(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error)
	mark      func(ctx context.Context, channel string, id dchannel.ID, keep time.Duration) (dchannel.Position, error)
	read      func(ctx context.Context, channel string, after dchannel.Position, limit int) (dchannel.Page, error)
	heads     func(ctx context.Context, channels []string) ([]dchannel.Head, error)
	subscribe func(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error)
	remove    func(ctx context.Context, channel string) error

	acquire   func(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error)
	extend    func(ctx context.Context, channel string, token dchannel.ID, ttl time.Duration) (dchannel.LockState, error)
	release   func(ctx context.Context, channel string, token dchannel.ID) (dchannel.LockState, error)
	endLock   func(ctx context.Context, channel string, fence uint64, o dchannel.LockOutcome) (dchannel.LockState, error)
	lockState func(ctx context.Context, channel string) (dchannel.LockState, error)
	watchLock func(ctx context.Context, channel string, hint func()) (dchannel.Subscription, error)
	fences    func(st dchannel.LockState) dchannel.LockState // stands behind those that are not replaced
}

func (b *broken) Publish(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
	if b.publish != nil {
		return b.publish(ctx, channel, f)
	}
	return b.Backend.Publish(ctx, channel, f)
}

func (b *broken) MarkClosed(ctx context.Context, channel string, id dchannel.ID, keep time.Duration) (dchannel.Position, error) {
	if b.mark != nil {
		return b.mark(ctx, channel, id, keep)
	}
	return b.Backend.MarkClosed(ctx, channel, id, keep)
}

func (b *broken) Read(ctx context.Context, channel string, after dchannel.Position, limit int) (dchannel.Page, error) {
	if b.read != nil {
		return b.read(ctx, channel, after, limit)
	}
	return b.Backend.Read(ctx, channel, after, limit)
}

func (b *broken) Heads(ctx context.Context, channels []string) ([]dchannel.Head, error) {
	if b.heads != nil {
		return b.heads(ctx, channels)
	}
	return b.Backend.Heads(ctx, channels)
}

func (b *broken) Subscribe(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
	if b.subscribe != nil {
		return b.subscribe(ctx, channel, sink)
	}
	return b.Backend.Subscribe(ctx, channel, sink)
}

func (b *broken) Remove(ctx context.Context, channel string) error {
	if b.remove != nil {
		return b.remove(ctx, channel)
	}
	return b.Backend.Remove(ctx, channel)
}

// lab is what the broken backends of one harness share.
type lab struct {
	mu         sync.Mutex
	order      map[string][]*broken        // who has subscribed, by channel
	publishers map[string]map[*broken]bool // by channel
	author     map[dchannel.ID]*broken     // of frames
	closed     map[string]dchannel.ID      // markers
	cuts       map[*broken]int
	paused     bool
	losing     bool // the state, just now
	restarts   int
}

// breaking returns a harness whose backends are the memory backend's after damage.
func breaking(damage func(l *lab, b *broken)) func() Harness {
	return func() Harness {
		h, _ := harnessWith(damage)
		return h
	}
}

func harnessWith(damage func(l *lab, b *broken)) (Harness, *lab) {
	h := Memory()
	base := h
	l := &lab{
		order: map[string][]*broken{}, publishers: map[string]map[*broken]bool{}, author: map[dchannel.ID]*broken{},
		closed: map[string]dchannel.ID{}, cuts: map[*broken]int{},
	}
	wrap := func(inner dchannel.Backend, short bool) dchannel.Backend {
		b := &broken{Backend: inner, lab: l, short: short}
		damage(l, b)
		return b
	}
	inner := func(b dchannel.Backend) dchannel.Backend { return b.(*broken).Backend }
	short := *base.Short
	h.Short = &short
	h.New = func(t testing.TB) dchannel.Backend { return wrap(base.New(t), false) }
	short.New = func(t testing.TB) dchannel.Backend { return wrap(base.Short.New(t), true) }
	short.Few = func(t testing.TB) dchannel.Backend { return wrap(base.Short.Few(t), true) }
	h.Cut = func(t testing.TB, b dchannel.Backend) func() {
		l.mu.Lock()
		l.cuts[b.(*broken)]++
		l.mu.Unlock()
		return base.Cut(t, inner(b))
	}
	h.Blackhole = func(t testing.TB, b dchannel.Backend) func() { return base.Blackhole(t, inner(b)) }
	h.LoseReply = func(t testing.TB, b dchannel.Backend, channel string) { base.LoseReply(t, inner(b), channel) }
	h.Connections = func(t testing.TB, b dchannel.Backend) int { return base.Connections(t, inner(b)) }
	h.Pause = func(t testing.TB) func() {
		resume := base.Pause(t)
		l.set(&l.paused, true)
		return func() {
			l.set(&l.paused, false)
			resume()
		}
	}
	h.Restart = func(t testing.TB, kill bool) func() {
		l.mu.Lock()
		l.restarts++
		l.mu.Unlock()
		return base.Restart(t, kill)
	}
	h.LoseState = func(t testing.TB) {
		l.set(&l.losing, true)
		defer l.set(&l.losing, false)
		base.LoseState(t)
	}
	return h, l
}

func (l *lab) set(flag *bool, to bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	*flag = to
}

func (l *lab) is(flag *bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return *flag
}

// nth returns how many other backends have subscribed to channel before b.
func (l *lab) nth(channel string, b *broken) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, x := range l.order[channel] {
		if x == b {
			return i
		}
	}
	l.order[channel] = append(l.order[channel], b)
	return len(l.order[channel]) - 1
}

// filter stands between the backend and a sink. Its calls do not overlap, and end
// with Close.
type filter struct {
	mu     sync.Mutex
	closed bool
	sink   dchannel.Sink
	sub    dchannel.Subscription

	entry  func(e dchannel.Entry) // called with mu held, as the others; nil: pass on
	resync func(reason error)
	state  func(s dchannel.State, reason error)
	onEnd  func()
}

// through subscribes with f in between.
func (f *filter) through(ctx context.Context, b *broken, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
	f.sink = sink
	sub, err := b.Backend.Subscribe(ctx, channel, f)
	if err != nil {
		return nil, err
	}
	f.sub = sub
	return f, nil
}

func (f *filter) Entry(e dchannel.Entry) {
	f.do(func() {
		if f.entry != nil {
			f.entry(e)
		} else {
			f.sink.Entry(e)
		}
	})
}

func (f *filter) Resync(reason error) {
	f.do(func() {
		if f.resync != nil {
			f.resync(reason)
		} else {
			f.sink.Resync(reason)
		}
	})
}

func (f *filter) State(s dchannel.State, reason error) {
	f.do(func() {
		if f.state != nil {
			f.state(s, reason)
		} else {
			f.sink.State(s, reason)
		}
	})
}

func (f *filter) do(call func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.closed {
		call()
	}
}

// later calls in a while, unless the subscription has been closed by then.
func (f *filter) later(d time.Duration, call func()) {
	time.AfterFunc(d, func() { f.do(call) })
}

func (f *filter) Close() {
	if f.onEnd != nil {
		f.onEnd()
	}
	f.sub.Close()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
}

// handles is a memory harness with broken handles.
func handles(wrap func(ch *dchannel.Channel, b dchannel.Backend) Handle) func() Harness {
	return func() Harness {
		h := Memory()
		h.Wrap = wrap
		return h
	}
}

// listenBy is Listen on top of Next.
func listenBy(ctx context.Context, next func(context.Context) (dchannel.Message, error)) (any, error) {
	m, err := next(ctx)
	if err != nil {
		return nil, err
	}
	return m.Value()
}

// rewrite returns f with its records changed.
func rewrite(f dchannel.Frame, change func(r *frame.Record)) dchannel.Frame {
	r, err := frame.Open(f.Data)
	data := frame.Begin(nil)
	for err == nil && r.More() {
		var rec frame.Record
		if rec, err = r.Next(); err == nil {
			change(&rec)
			data = frame.Append(data, rec)
		}
	}
	if err == nil {
		f.Data = data
	}
	return f
}

var errOdd = errors.New("no particular reason")
