package nats

import (
	"context"
	"errors"
	"slices"
	"sync"

	natsgo "github.com/nats-io/nats.go"

	"github.com/dchannel/dchannel"
)

// pushBuffer is how many pushes wait between the client and the dispatcher. The
// client drops what does not fit, and then the subscriptions are told.
const pushBuffer = 8192

// subscription is one channel's push.
type subscription struct {
	b       *Backend
	subject string
	channel *channel

	mu      sync.Mutex // held during every call of the sink
	sink    dchannel.Sink
	closed  bool
	lock    bool   // of a lock: any message is a hint
	place   uint64 // of the newest message that there was a hint for
	sub     *natsgo.Subscription
	dropped int
}

// Subscribe implements [dchannel.Backend].
func (b *Backend) Subscribe(ctx context.Context, channel string, sink dchannel.Sink) (dchannel.Subscription, error) {
	return b.subscribe(ctx, func() *subscription {
		return &subscription{b: b, subject: b.names.push + token(channel), sink: sink, channel: b.channel(channel)}
	})
}

func (b *Backend) subscribe(ctx context.Context, build func() *subscription) (dchannel.Subscription, error) {
	var s *subscription
	err := b.retryMissing(ctx, func() error {
		s = build()
		return b.begin(ctx, s)
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (b *Backend) begin(ctx context.Context, s *subscription) error {
	b.subsMu.Lock()
	if err := b.isClosed(); err != nil {
		b.subsMu.Unlock()
		return err
	}
	b.subs[s.subject] = append(slices.Clip(b.subs[s.subject]), s)
	b.subsMu.Unlock()
	s.channel.pin(1)
	life := b.life.Load()
	done := make(chan error, 1)
	b.wire.queue.add(func() {
		before := b.conn.LastError()
		if err := s.open(); err != nil {
			done <- err
		} else if !b.spawn(func() { done <- s.confirm(before) }) {
			done <- errClosed
		}
	})
	var err error
	select {
	case err = <-done:
	case <-b.closed:
		err = b.closeErr
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err == nil && life != b.life.Load() {
		err = errCut // the flush may have been answered before the server had it
	}
	if err != nil {
		s.Close()
		return mapError(err, false)
	}
	s.state(dchannel.StateLive, nil)
	return nil
}

// open runs on the queue's goroutine, and without the lock: it may take a while.
func (s *subscription) open() error {
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return errClosed
	}
	sub, err := s.b.conn.ChanSubscribe(s.subject, s.b.pushes)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.sub = sub // Close, from now on, queues the end of it
	s.mu.Unlock()
	return nil
}

// confirm returns when the server has taken the subscription, or has refused it.
func (s *subscription) confirm(before error) error {
	conn := s.b.conn
	err := conn.FlushTimeout(s.b.opt.probeTimeout)
	if err == nil {
		return refusal(conn, before, s.subject)
	}
	if errors.Is(err, natsgo.ErrConnectionClosed) && !conn.IsClosed() {
		return errCut // what the client says of a flush under which the connection broke
	}
	return err
}

// Close implements [dchannel.Subscription].
func (s *subscription) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	b := s.b
	b.subsMu.Lock()
	left := slices.DeleteFunc(slices.Clone(b.subs[s.subject]), func(o *subscription) bool { return o == s })
	if len(left) > 0 {
		b.subs[s.subject] = left
	} else {
		delete(b.subs, s.subject)
	}
	b.subsMu.Unlock()
	s.channel.pin(-1)
	b.wire.queue.add(func() {
		s.mu.Lock()
		sub := s.sub
		s.mu.Unlock()
		if sub != nil { // what comes before this in the queue has set it
			_ = sub.Unsubscribe() // only a closed connection fails, and has none
		}
	})
}

func (s *subscription) entry(e dchannel.Entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.sink.Entry(e)
	}
}

func (s *subscription) resync(reason error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.sink.Resync(reason)
	}
}

func (s *subscription) state(state dchannel.State, reason error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.sink.State(state, reason)
	}
}

// hasDropped says whether the client has dropped pushes since the last time.
func (s *subscription) hasDropped() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sub == nil {
		return false
	}
	n, err := s.sub.Dropped()
	news := err == nil && n != s.dropped
	s.dropped = n
	return news
}

func (b *Backend) subscriptions() []*subscription {
	b.subsMu.RLock()
	defer b.subsMu.RUnlock()
	subs := make([]*subscription, 0, len(b.subs))
	for _, s := range b.subs {
		subs = append(subs, s...)
	}
	return subs
}

var errOverflow = errors.New("nats: pushes came faster than they were taken")

// dispatch hands out what is pushed, for all channels. The client drops a push when
// the buffer is full at that moment; then it is nearly full after the next receive.
func (b *Backend) dispatch() {
	overflow := false
	for {
		select {
		case m := <-b.pushes:
			overflow = overflow || len(b.pushes) >= pushBuffer-1
			b.push(m)
			if overflow && len(b.pushes) < pushBuffer/2 {
				overflow = false
				b.overflowed()
			}
		case <-b.closed:
			return
		}
	}
}

func (b *Backend) push(m *natsgo.Msg) {
	b.subsMu.RLock()
	subs := b.subs[m.Subject] // never changed, only replaced
	b.subsMu.RUnlock()
	if len(subs) == 0 {
		return
	}
	if subs[0].lock { // no log has the subject of a lock
		for _, s := range subs {
			b.lockPushed(s, number(m, headerSequence))
		}
		return
	}
	life := b.life.Load()
	r, err := decode(m)
	if err != nil {
		b.foreign(m, err)
		return
	}
	b.memory.see(r.place)
	subs[0].channel.learn(r, life, b.stride())
	for _, s := range subs {
		s.entry(r.Entry)
	}
}

func (b *Backend) overflowed() {
	n := 0
	for _, s := range b.subscriptions() {
		if s.hasDropped() {
			n++
			s.resync(errOverflow)
		}
	}
	b.opt.logger.Warn(errOverflow.Error(), "channels", n)
}
