package redis

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/entry"
)

// neverDial is passed to go-redis' PubSub for everything behind the first
// connection. Reading and writing do not look at a context without a deadline;
// dialling does, so that PubSub cannot reconnect by itself and subscribe all
// channels in one command while we do not know it. (With TLS, or a Dialer that
// ignores its context, it still can: session.confirmed finds that.)
var neverDial = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// conn is one connection of a session.
type conn struct {
	ps       *goredis.PubSub
	received atomic.Uint64 // counts what was read
	halves   map[string]half
	pong     chan struct{} // holds a token when a probe came back
	lost     chan struct{} // closed by drop

	once sync.Once
	err  error // why it was dropped; set before lost is closed
}

// half is a large entry whose header has come and whose data has not: the append
// script publishes them one after the other, because to join them costs it more than
// all the rest.
type half struct {
	e    dchannel.Entry
	size int
}

// parse takes one pushed message. whole tells whether e is complete with it.
func (c *conn) parse(key, payload string) (e dchannel.Entry, whole bool, err error) {
	if h, ok := c.halves[key]; ok {
		delete(c.halves, key)
		if len(payload) != h.size {
			return e, false, fmt.Errorf("%w: %d bytes of data, announced were %d", entry.ErrForeign, len(payload), h.size)
		}
		h.e.Data = bytesOf(payload)
		return h.e, true, nil
	}
	rest, split := strings.CutPrefix(payload, "S")
	if !split {
		e, err = entry.Parse(bytesOf(payload))
		return e, true, err
	}
	text, header, _ := strings.Cut(rest, " ")
	size, err := strconv.Atoi(text)
	if err != nil {
		return e, false, fmt.Errorf("%w: no size", entry.ErrForeign)
	}
	if e, err = entry.Parse(bytesOf(header)); err != nil {
		return e, false, err
	}
	c.halves[key] = half{e, size}
	return e, false, nil
}

// drop ends the connection, for the first reason given.
func (c *conn) drop(reason error) {
	c.once.Do(func() {
		c.err = reason
		close(c.lost)
		_ = c.ps.Close() // receive returns
	})
}

func (c *conn) answered() {
	select {
	case c.pong <- struct{}{}:
	default:
	}
}

// connect makes a connection and shows that it is one: what is published through
// the pool comes out of it. The same step binds the incarnation to this server,
// so that no Resync is called before it is right. An attempt that takes longer than
// the probe may is left to itself: go-redis ends it after its own timeouts.
func (s *session) connect() (*conn, error) {
	ctx, cancel := context.WithTimeout(s.ctx, s.b.o.probeTimeout)
	defer cancel()
	type result struct {
		c   *conn
		err error
	}
	done := make(chan result)
	if err := s.b.enter(ctx); err != nil {
		return nil, err
	}
	go func() {
		defer s.b.running.Done()
		c := &conn{
			ps:     s.b.client.Subscribe(ctx),
			halves: make(map[string]half),
			pong:   make(chan struct{}, 1),
			lost:   make(chan struct{}),
		}
		err := s.handshake(ctx, c)
		if err != nil {
			_ = c.ps.Close()
		}
		select {
		case done <- result{c, err}:
		case <-ctx.Done():
			_ = c.ps.Close()
		}
	}()
	select {
	case r := <-done:
		return r.c, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *session) handshake(ctx context.Context, c *conn) error {
	defer context.AfterFunc(ctx, func() { _ = c.ps.Close() })() // ends ReceiveTimeout
	if err := c.ps.Subscribe(ctx, s.probe); err != nil {
		return err
	}
	if _, err := c.ps.ReceiveTimeout(neverDial, s.b.o.probeTimeout); err != nil {
		return err
	}
	memory, err := s.b.loadIncarnation(ctx, s.probe)
	if err != nil {
		return err
	}
	if _, err := c.ps.ReceiveTimeout(neverDial, s.b.o.probeTimeout); err != nil {
		return fmt.Errorf("what the pool publishes does not arrive: %w", err)
	}
	s.mu.Lock()
	s.memory = memory
	s.mu.Unlock()
	return nil
}

// flush writes SUBSCRIBE and UNSUBSCRIBE, as many channels at a time as have
// gathered while the last batch was written.
func (s *session) flush(c *conn) {
	for {
		select {
		case <-c.lost:
			return
		case <-s.wake:
		}
		for {
			gone, come := s.nextBatch(c)
			var err error
			switch {
			case len(gone) > 0:
				err = c.ps.Unsubscribe(neverDial, gone...)
			case len(come) > 0:
				err = c.ps.Subscribe(neverDial, come...)
			}
			if err != nil {
				c.drop(err)
				return
			}
			if len(gone)+len(come) == 0 {
				break
			}
		}
	}
}

// nextBatch returns the next channels to unsubscribe; only when there are none, the
// next to subscribe: a channel may be in both lists, closed and opened again.
func (s *session) nextBatch(c *conn) (gone, come []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != c {
		return nil, nil
	}
	if n := min(len(s.gone), batch); n > 0 {
		gone, s.gone = s.gone[:n:n], s.gone[n:]
		return gone, nil
	}
	asked := s.take(&s.alone, 1)
	if len(asked) == 0 {
		asked = s.take(&s.pending, batch)
	}
	if len(asked) > 0 {
		s.asked = append(s.asked, asked)
	}
	for _, sub := range asked {
		sub.sent = true
		come = append(come, sub.key)
	}
	return nil, come
}

// take moves up to n subscriptions that are not closed out of list. s.mu is held.
func (s *session) take(list *[]*subscription, n int) (subs []*subscription) {
	rest := *list
	for len(rest) > 0 && len(subs) < n {
		if sub := rest[0]; s.subs[sub.key] == sub {
			subs = append(subs, sub)
		}
		rest[0], rest = nil, rest[1:]
	}
	if len(rest) == 0 {
		rest = nil // and with it the memory of the largest backlog
	}
	*list = rest
	return subs
}

// watch probes the connection whenever nothing has come for an interval.
func (s *session) watch(c *conn) {
	t := time.NewTicker(s.b.o.probeInterval)
	defer t.Stop()
	seen := c.received.Load()
	for {
		select {
		case <-c.lost:
			return
		case <-t.C:
		}
		if n := c.received.Load(); n != seen {
			seen = n
			continue
		}
		if !s.alive(c) {
			c.drop(errNoAnswer)
			return
		}
		seen = c.received.Load()
	}
}

// alive probes once. The probe goes through the pool, so that it also looks after
// the incarnation: it keeps it from expiring, and finds a flush and a failover that
// broke no connection. When the pool does not work, the connection is asked alone.
func (s *session) alive(c *conn) bool {
	ctx, cancel := context.WithTimeout(s.ctx, s.b.o.probeTimeout)
	defer cancel()
	before := c.received.Load()
	select {
	case <-c.pong:
	default:
	}
	pool, done := context.WithTimeout(ctx, s.b.o.probeTimeout/2)
	defer done()
	memory, err := s.b.loadIncarnation(pool, s.probe)
	if err == nil {
		s.mu.Lock()
		changed := s.memory != memory
		s.memory = memory
		s.mu.Unlock()
		if changed {
			s.resync(errNewMemory)
		}
	} else if err := c.ps.Ping(neverDial); err != nil {
		return false
	}
	select {
	case <-c.pong:
		return true
	case <-c.lost:
		return true // and has a reason already
	case <-ctx.Done():
		return s.ctx.Err() != nil || c.received.Load() != before
	}
}
