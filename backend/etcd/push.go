package etcd

import (
	"context"
	"errors"
	"sync"

	"github.com/dchannel/dchannel"
)

// push is the one watch of a backend and the subscriptions that it serves. It is made by the first
// of them and ends with the last.
type push struct {
	b      *Backend
	ctx    context.Context
	cancel context.CancelFunc
	kick   chan struct{} // asks for a probe now
	heard  chan struct{} // the watch has answered a progress request

	// turning serialises changes of state and what the sinks are told about them. It is taken before mu.
	turning sync.Mutex

	mu      sync.Mutex
	subs    map[string][]*subscription
	count   int
	watch   bool  // the watch is open
	answers bool  // the last probe was answered
	reason  error // why it is not live
	final   error // refused: subscribing will not help
	began   bool  // it was live once
	changed chan struct{}
	restart context.CancelCauseFunc
	seen    int64 // the revision up to which the watch has pushed; 0 for unknown
	// progress asks the open watch for an answer; nil while there is none.
	progress func(context.Context) error
}

type subscription struct {
	p    *push
	name string
	sink dchannel.Sink
	mu   sync.Mutex // held while a sink method runs
	done bool
}

// Subscribe adds channel to the channels that the watch's events are looked through for. It waits
// for the watch to be live, which it normally is; only the first subscription opens it.
func (b *Backend) Subscribe(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
	return b.subscribe(ctx, escape(channel), sink)
}

func (b *Backend) subscribe(ctx context.Context, name string, sink dchannel.Sink) (dchannel.Subscription, error) {
	ctx, done, err := b.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	s := &subscription{name: name, sink: sink}
	if err := b.register(s); err != nil {
		return nil, err
	}
	if err := s.p.await(ctx, s); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// Close takes the subscription out. With the last one the watch is cancelled.
func (s *subscription) Close() {
	s.mu.Lock()
	over := s.done
	s.done, s.sink = true, nil
	s.mu.Unlock()
	if !over {
		s.p.b.unregister(s)
	}
}

// tell calls the sink unless the subscription has been closed.
func (s *subscription) tell(f func(dchannel.Sink)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.done {
		f(s.sink)
	}
}

func (b *Backend) register(s *subscription) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return dchannel.ErrBackendClosed
	}
	if b.push == nil {
		p := &push{
			b: b, kick: make(chan struct{}, 1), heard: make(chan struct{}, 1), answers: true,
			subs: make(map[string][]*subscription), changed: make(chan struct{}),
			reason: errors.New("the watch is being opened"),
		}
		p.ctx, p.cancel = context.WithCancel(b.ctx)
		b.push = p
		b.wg.Go(p.watchLoop)
		b.wg.Go(p.probeLoop)
		b.wg.Go(p.connectionLoop)
	}
	p := b.push
	s.p = p
	p.mu.Lock()
	defer p.mu.Unlock()
	p.subs[s.name] = append(p.subs[s.name], s)
	p.count++
	return nil
}

func (b *Backend) unregister(s *subscription) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := s.p
	p.mu.Lock()
	defer p.mu.Unlock()
	left := p.subs[s.name]
	for i, other := range left {
		if other == s {
			left = append(left[:i:i], left[i+1:]...) // a copy: the dispatcher may be reading the old one
			p.count--
			break
		}
	}
	if len(left) > 0 {
		p.subs[s.name] = left
	} else {
		delete(p.subs, s.name)
	}
	if p.count == 0 && b.push == p {
		b.push = nil
		p.cancel()
	}
}

func (b *Backend) pushing() *push {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.push
}

// await waits until pushes flow, and tells s so.
func (p *push) await(ctx context.Context, s *subscription) error {
	for {
		p.turning.Lock()
		p.mu.Lock()
		live, changed, final, reason := p.watch && p.answers, p.changed, p.final, p.reason
		p.mu.Unlock()
		if live {
			s.tell(func(k dchannel.Sink) { k.State(dchannel.StateLive, nil) })
		}
		p.turning.Unlock()
		if live {
			return nil
		}
		if final != nil {
			return final
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return &waitError{ended(ctx), reason}
		}
	}
}

// waitError is the context's error, and says what the wait was for.
type waitError struct{ err, reason error }

func (e *waitError) Error() string { return e.err.Error() + ": no pushes: " + e.reason.Error() }
func (e *waitError) Unwrap() error { return e.err }

// turn changes the condition of the push by f and tells all sinks what came of it: interrupted when
// it ceases to be live, live and resync when it is so again.
func (p *push) turn(reason error, f func()) {
	p.turning.Lock()
	defer p.turning.Unlock()
	p.mu.Lock()
	before, why := p.watch && p.answers, p.reason
	f()
	live := p.watch && p.answers
	if !live && reason != nil {
		p.reason = reason
	}
	again := live && p.began
	p.began = p.began || live
	close(p.changed)
	p.changed = make(chan struct{})
	var all []*subscription
	if before != live {
		for _, s := range p.subs {
			all = append(all, s...)
		}
	}
	p.mu.Unlock()
	switch {
	case before && !live:
		p.b.log.Warn("etcd backend: interrupted", "reason", reason)
		for _, s := range all {
			s.tell(func(k dchannel.Sink) { k.State(dchannel.StateInterrupted, reason) })
		}
	case !before && again:
		p.b.log.Info("etcd backend: live again", "after", why)
		for _, s := range all {
			s.tell(func(k dchannel.Sink) {
				k.State(dchannel.StateLive, nil)
				k.Resync(why)
			})
		}
	}
}

// fail ends all subscriptions for good.
func (p *push) fail(reason error) {
	p.turning.Lock()
	defer p.turning.Unlock()
	p.mu.Lock()
	subs := p.subs
	p.subs, p.final = make(map[string][]*subscription), reason
	p.mu.Unlock()
	for _, list := range subs {
		for _, s := range list {
			s.tell(func(k dchannel.Sink) { k.State(dchannel.StateFailed, reason) })
			s.mu.Lock()
			s.done, s.sink = true, nil
			s.mu.Unlock()
		}
	}
}

// restartWatch makes the watch loop begin anew. A revision of a store that is gone means nothing in
// the next one, where a watch from it would wait in silence.
func (p *push) restartWatch(reason error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if errors.Is(reason, errStateLost) {
		p.seen = 0
	}
	if p.restart != nil {
		p.restart(reason)
	}
}
