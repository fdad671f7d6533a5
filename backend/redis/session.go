package redis

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/dchannel/dchannel"
)

const (
	// batch is how many channels one SUBSCRIBE names: the server does nothing else
	// meanwhile, and 512 take it about half a millisecond.
	batch = 512

	minDelay = 10 * time.Millisecond
	maxDelay = time.Second
)

var (
	errReconnected = errors.New("the client reconnected by itself")
	errNoAnswer    = errors.New("no answer to the probe")
	errNewMemory   = errors.New("the server's memory is another one")
	errNewConn     = errors.New("connected anew")
)

// session is the life of the subscription connection: made for the first
// subscription, ended with the last one. At any time it is connecting or serves one
// connection; a connection that has failed in any way is thrown away.
type session struct {
	b      *Backend
	ctx    context.Context // ends with the session
	cancel context.CancelFunc
	probe  string        // the publish/subscribe channel of our own probes
	wake   chan struct{} // holds one token when there is something for flush

	mu      sync.Mutex
	ended   bool
	subs    map[string]*subscription
	conn    *conn           // nil while connecting
	pending []*subscription // to be subscribed on conn; closed ones are skipped
	gone    []string        // to be unsubscribed on conn, before pending
	alone   []*subscription // as pending, but one by one
	// asked are the SUBSCRIBEs under way, oldest first, less what is confirmed. A
	// confirmation belongs to the subscription that it was asked for: the next one
	// of the same channel must not take it for its own, as an UNSUBSCRIBE is between.
	asked [][]*subscription

	memory dchannel.ID // the incarnation at the last look
}

func newSession(b *Backend) *session {
	s := &session{
		b:     b,
		probe: b.keys.probe(dchannel.NewID().String()),
		wake:  make(chan struct{}, 1),
		subs:  make(map[string]*subscription),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// add reports whether sub is part of the session now; not so when that has ended.
func (s *session) add(sub *subscription) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return false, nil
	}
	if s.subs[sub.key] != nil {
		return false, errTwice
	}
	sub.s = s
	s.subs[sub.key] = sub
	if s.conn != nil { // otherwise all subs are subscribed with the next one
		s.pending = append(s.pending, sub)
		s.kick()
	}
	return true, nil
}

func (s *session) remove(sub *subscription) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.subs[sub.key] != sub {
		return
	}
	delete(s.subs, sub.key)
	if len(s.subs) == 0 {
		s.end()
		return
	}
	if s.conn != nil && sub.sent {
		s.gone = append(s.gone, sub.key)
		s.kick()
	}
}

// end makes run return; a next subscription begins another session. s.mu is held.
func (s *session) end() {
	s.ended = true
	s.cancel()
}

func (s *session) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// fail ends the session and all its subscriptions.
func (s *session) fail(reason error) {
	s.mu.Lock()
	subs := s.subs
	s.subs = nil
	s.end()
	for _, sub := range subs {
		sub.release(reason)
	}
	s.mu.Unlock()
	for _, sub := range subs {
		sub.end(reason)
	}
}

// release lets the call of Subscribe return, if it still waits. s.mu is held.
func (sub *subscription) release(err error) {
	if sub.wait != nil {
		sub.wait.err = err
		close(sub.wait.done)
		sub.wait = nil
	}
}

func (s *session) run() {
	delay := minDelay
	reason := errNewConn
	for s.ctx.Err() == nil {
		c, err := s.connect()
		if err == nil {
			began := time.Now()
			reason = s.serve(c, reason)
			if time.Since(began) > 2*delay {
				delay = minDelay
			}
		} else if s.ctx.Err() == nil {
			s.refuse(err)
		}
		pause(s.ctx, delay/2+rand.N(delay/2+1))
		delay = min(2*delay, maxDelay)
	}
}

// refuse tells the callers of Subscribe that there is no connection. Who has been
// subscribed before stays so.
func (s *session) refuse(err error) {
	if errors.Is(err, goredis.ErrClosed) { // the client was closed, and cannot be opened again
		s.fail(mapError(err, false))
		return
	}
	s.b.o.logger.Debug("redis: cannot connect for pushes", "error", err)
	err = mapError(err, false)
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("%w: not connected within %v", dchannel.ErrUnavailable, s.b.o.probeTimeout)
	}
	s.mu.Lock()
	var refused []*subscription
	for key, sub := range s.subs {
		if sub.wait != nil {
			delete(s.subs, key)
			refused = append(refused, sub)
			sub.release(err)
		}
	}
	if len(s.subs) == 0 {
		s.end()
	}
	s.mu.Unlock()
	for _, sub := range refused {
		sub.Close()
	}
}

// serve reads c until it fails, and returns why.
func (s *session) serve(c *conn, reason error) error {
	s.mu.Lock()
	s.conn, s.gone, s.alone, s.asked = c, nil, nil, nil
	s.pending = make([]*subscription, 0, len(s.subs))
	for _, sub := range s.subs {
		sub.sent, sub.live = false, false
		s.pending = append(s.pending, sub)
	}
	s.kick()
	s.mu.Unlock()

	defer context.AfterFunc(s.ctx, func() { c.drop(context.Canceled) })()
	var helpers sync.WaitGroup
	helpers.Go(func() { s.flush(c) })
	helpers.Go(func() { s.watch(c) })
	err := s.receive(c, reason)
	c.drop(err)
	helpers.Wait()
	s.interrupted(c.err)
	return c.err
}

// receive is the read loop. It never blocks but for reading: a subscriber that does
// not read is thrown out by the server.
func (s *session) receive(c *conn, reason error) error {
	for {
		msg, err := c.ps.Receive(neverDial)
		if err != nil {
			if s.refused(err) {
				continue
			}
			return err
		}
		c.received.Add(1)
		switch msg := msg.(type) {
		case *goredis.Message:
			if msg.Channel == s.probe {
				c.answered()
			} else {
				s.push(c, msg.Channel, msg.Payload)
			}
		case *goredis.Subscription:
			if msg.Kind == "subscribe" {
				if err := s.confirmed(msg.Channel, reason); err != nil {
					return err
				}
			}
		case *goredis.Pong:
			c.answered()
		}
	}
}

// refused takes an error that the server answered with: this user may not subscribe
// to a channel of the oldest batch under way. The answer does not say to which, so
// they are tried one by one. It reports whether that is what the error is about.
func (s *session) refused(err error) bool {
	var answer goredis.Error
	if !errors.As(err, &answer) {
		return false
	}
	s.mu.Lock()
	if len(s.asked) == 0 {
		s.mu.Unlock()
		return false
	}
	subs := s.asked[0]
	s.asked = s.asked[1:]
	for _, sub := range subs {
		sub.sent = false
	}
	if len(subs) > 1 {
		s.alone = append(s.alone, subs...)
		s.kick()
		s.mu.Unlock()
		return true
	}
	sub := subs[0]
	if s.subs[sub.key] == sub {
		delete(s.subs, sub.key)
	}
	err = mapError(err, false)
	waited := sub.wait != nil
	sub.release(err)
	if len(s.subs) == 0 {
		s.end()
	}
	s.mu.Unlock()
	if waited {
		sub.Close()
	} else {
		sub.end(err)
	}
	return true
}

func (s *session) push(c *conn, key, payload string) {
	s.mu.Lock()
	sub := s.subs[key]
	s.mu.Unlock()
	if s.b.keys.isNotice(key) {
		if sub != nil {
			sub.tell(func(to dchannel.Sink) { to.(lockSink)() })
		}
		return
	}
	e, whole, err := c.parse(key, payload)
	switch {
	case err != nil:
		s.b.foreign("push", key, err)
	case whole && sub != nil:
		sub.tell(func(to dchannel.Sink) { to.Entry(e) })
	}
}

// confirmed takes the server's word that key is subscribed. The answers come in the
// order of the questions. One to no question means that go-redis has made a new
// connection without a word, and that pushes are missing.
func (s *session) confirmed(key string, reason error) error {
	s.mu.Lock()
	if len(s.asked) == 0 || s.asked[0][0].key != key {
		s.mu.Unlock()
		return errReconnected
	}
	sub := s.asked[0][0]
	if s.asked[0] = s.asked[0][1:]; len(s.asked[0]) == 0 {
		s.asked = s.asked[1:]
	}
	if s.subs[key] != sub { // closed meanwhile, and another one of the same channel may wait
		s.mu.Unlock()
		return nil
	}
	sub.live = true
	first := sub.wait != nil
	sub.release(nil)
	s.mu.Unlock()
	if !first {
		sub.tell(func(to dchannel.Sink) {
			to.State(dchannel.StateLive, nil)
			to.Resync(reason)
		})
	}
	return nil
}

// interrupted tells those who were live on the lost connection.
func (s *session) interrupted(err error) {
	s.mu.Lock()
	s.conn, s.pending, s.gone, s.alone, s.asked = nil, nil, nil, nil, nil
	var subs []*subscription
	for _, sub := range s.subs {
		if sub.live {
			sub.live = false
			subs = append(subs, sub)
		}
		sub.sent = false
	}
	s.mu.Unlock()
	if len(subs) > 0 {
		s.b.o.logger.Warn("redis: pushes are interrupted", "channels", len(subs), "error", err)
	}
	for _, sub := range subs {
		sub.tell(func(to dchannel.Sink) { to.State(dchannel.StateInterrupted, err) })
	}
}

// resync tells everybody who is live that the server has another memory.
func (s *session) resync(reason error) {
	s.mu.Lock()
	var subs []*subscription
	for _, sub := range s.subs {
		if sub.live {
			subs = append(subs, sub)
		}
	}
	s.mu.Unlock()
	for _, sub := range subs {
		sub.tell(func(to dchannel.Sink) { to.Resync(reason) })
	}
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
