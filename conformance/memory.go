package conformance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
)

// Memory returns the harness of the memory backend, on a new store. It is complete, and
// so an example of all hooks.
func Memory() Harness { return onMemory(memory.WithIdleExpiry(shortMemory)) }

// shortMemory is how long the server behind Short remembers.
const shortMemory = 1500 * time.Millisecond

func onMemory(idle memory.Option) Harness {
	s := newMemoryServer()
	short := newMemoryServer(memory.WithRetention(64, shortMemory), idle)
	few := newMemoryServer(memory.WithRetention(64, memory.DefaultRetention))
	servers := []*memoryServer{s, short, few}
	return Harness{
		New: func(testing.TB) dchannel.Backend { return s.connect() },
		Short: &Short{
			New:       func(testing.TB) dchannel.Backend { return short.connect() },
			Few:       func(testing.TB) dchannel.Backend { return few.connect() },
			Messages:  64,
			Dropped:   100,
			Retention: shortMemory,
			Gone:      shortMemory + 100*time.Millisecond,
		},
		Cut: func(_ testing.TB, b dchannel.Backend) func() {
			b.(*line).Cut(nil)
			return b.(*line).Heal
		},
		Blackhole: func(_ testing.TB, b dchannel.Backend) func() { return b.(*line).blackhole() },
		LoseReply: func(_ testing.TB, b dchannel.Backend, _ string) { b.(*line).LoseReplies(1) },
		Pause: func(testing.TB) func() {
			s.store.Pause()
			return s.store.Resume
		},
		Restart:   func(testing.TB, bool) func() { return s.restart() },
		LoseState: func(testing.TB) { s.store.LoseState() },
		Upstreams: func(_ testing.TB, channel string) (n int) {
			for _, s := range servers {
				n += s.store.Subscriptions(channel)
			}
			return n
		},
		Connections: func(testing.TB, dchannel.Backend) int { return 1 },
		Calls:       func(testing.TB) int { return int(s.store.Calls()) },
		Holds: func(t testing.TB, channel string) (held []string) {
			for _, s := range servers {
				heads, err := s.store.Backend().Heads(t.Context(), []string{channel})
				if err != nil {
					t.Fatalf("Heads: %v", err)
				}
				if heads[0].Epoch != 0 {
					held = append(held, fmt.Sprintf("the log %v of %q", heads[0].Position, channel))
				}
			}
			return held
		},
		// Whatever a store holds has a deadline.
		Eternal: func(testing.TB) []string { return nil },
	}
}

// memoryServer is a store, and those who are connected to it.
type memoryServer struct {
	store *memory.Store
	mu    sync.Mutex
	lines []*line
}

func newMemoryServer(opts ...memory.Option) *memoryServer {
	return &memoryServer{store: memory.NewStore(opts...)}
}

func (s *memoryServer) connect() *line {
	l := &line{Backend: s.store.Backend(), server: s, sinks: map[*lineSink]struct{}{}, taken: map[string]bool{}}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lines = append(s.lines, l)
	return l
}

// restart cuts everyone off until start is called.
func (s *memoryServer) restart() (start func()) {
	s.mu.Lock()
	lines := slices.Clone(s.lines)
	s.mu.Unlock()
	for _, l := range lines {
		l.Cut(errors.New("the server was restarted"))
	}
	return func() {
		for _, l := range lines {
			l.Heal()
		}
	}
}

// line is a memory backend whose connection can fall silent, which a backend in the
// same process cannot do by itself.
type line struct {
	*memory.Backend
	server *memoryServer

	mu    sync.Mutex
	hole  chan struct{} // not nil while it is silent; closed by heal
	sinks map[*lineSink]struct{}
	taken map[string]bool // channels that have a subscription, or are about to
}

var errSilence = errors.New("no answer, and at last the connection was reset")

func (l *line) blackhole() (heal func()) {
	hole := make(chan struct{})
	l.mu.Lock()
	l.hole = hole
	sinks := l.each()
	l.mu.Unlock()
	for _, s := range sinks {
		s.interrupt()
	}
	return func() {
		l.mu.Lock()
		l.hole = nil
		sinks := l.each()
		l.mu.Unlock()
		close(hole)
		for _, s := range sinks {
			s.restore()
		}
	}
}

func (l *line) each() (all []*lineSink) {
	for s := range l.sinks {
		all = append(all, s)
	}
	return all
}

// silence waits out a blackhole that a call has got into.
func (l *line) silence(ctx context.Context, sentinel error) error {
	l.mu.Lock()
	hole := l.hole
	l.mu.Unlock()
	if hole == nil {
		return nil
	}
	select {
	case <-hole:
		return fmt.Errorf("%w: %w", sentinel, errSilence)
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", sentinel, ctx.Err())
	}
}

func (l *line) Publish(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
	if err := l.silence(ctx, dchannel.ErrUncertain); err != nil {
		return dchannel.Position{}, err
	}
	return l.Backend.Publish(ctx, channel, f)
}

func (l *line) PublishNow(channel string, f dchannel.Frame) (dchannel.Position, bool, error) {
	l.mu.Lock()
	silent := l.hole != nil
	l.mu.Unlock()
	if silent {
		return dchannel.Position{}, false, nil
	}
	return l.Backend.PublishNow(channel, f)
}

func (l *line) MarkClosed(ctx context.Context, channel string, id dchannel.ID, keep time.Duration) (dchannel.Position, error) {
	if err := l.silence(ctx, dchannel.ErrUncertain); err != nil {
		return dchannel.Position{}, err
	}
	return l.Backend.MarkClosed(ctx, channel, id, keep)
}

func (l *line) Read(ctx context.Context, channel string, after dchannel.Position, limit int) (dchannel.Page, error) {
	if err := l.silence(ctx, dchannel.ErrUnavailable); err != nil {
		return dchannel.Page{}, err
	}
	return l.Backend.Read(ctx, channel, after, limit)
}

func (l *line) Heads(ctx context.Context, channels []string) ([]dchannel.Head, error) {
	if err := l.silence(ctx, dchannel.ErrUnavailable); err != nil {
		return nil, err
	}
	return l.Backend.Heads(ctx, channels)
}

func (l *line) Remove(ctx context.Context, channel string) error {
	if err := l.silence(ctx, dchannel.ErrUncertain); err != nil {
		return err
	}
	return l.Backend.Remove(ctx, channel)
}

func (l *line) Subscribe(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
	if err := l.silence(ctx, dchannel.ErrUnavailable); err != nil {
		return nil, err
	}
	if _, err := l.Backend.Heads(ctx, nil); err != nil {
		return nil, err
	}
	// The core promises drivers that there is never a second one.
	l.mu.Lock()
	taken := l.taken[channel]
	l.taken[channel] = true
	l.mu.Unlock()
	if taken {
		return nil, fmt.Errorf("a second subscription of %q", channel)
	}
	s := &lineSink{line: l, channel: channel, sink: sink}
	sub, err := l.Backend.Subscribe(ctx, channel, s)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		delete(l.taken, channel)
		return nil, err
	}
	s.sub = sub
	l.sinks[s] = struct{}{}
	return s, nil
}

// lineSink stands between the store and a sink.
type lineSink struct {
	line    *line
	channel string
	sink    dchannel.Sink
	sub     dchannel.Subscription

	mu     sync.Mutex
	silent bool
	closed bool
}

func (s *lineSink) Entry(e dchannel.Entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.silent && !s.closed {
		s.sink.Entry(e)
	}
}

func (s *lineSink) Resync(reason error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.silent && !s.closed {
		s.sink.Resync(reason)
	}
}

func (s *lineSink) State(state dchannel.State, reason error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.sink.State(state, reason)
	}
}

func (s *lineSink) interrupt() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.silent = true
	if !s.closed {
		s.sink.State(dchannel.StateInterrupted, errSilence)
	}
}

func (s *lineSink) restore() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.silent = false
	if !s.closed {
		s.sink.State(dchannel.StateLive, nil)
		s.sink.Resync(errSilence)
	}
}

func (s *lineSink) Close() {
	s.sub.Close()
	s.mu.Lock()
	again := s.closed
	s.closed = true
	s.mu.Unlock()
	if again {
		return
	}
	s.line.mu.Lock()
	defer s.line.mu.Unlock()
	delete(s.line.sinks, s)
	delete(s.line.taken, s.channel)
}
