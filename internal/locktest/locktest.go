// Package locktest records what several clients see of one channel's lock, and checks
// with porcupine that the record is that of a lock: that there is an order of all
// operations, each between its call and its return, in which every answer is right.
//
// A lock that runs out is an operation too, of nobody: it happens once to each generation
// that was neither released nor forced, when the TTL of its last extension is over, give
// or take what the server may be early or late. So a lock that lives too long or too
// short has no such order.
package locktest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/dchannel/dchannel"
)

// Config says how much is done, and how exact the server is.
type Config struct {
	// Channels is how many locks are used, Clients by how many clients each, for how
	// long. 0 stands for 4, 5 and 5 s.
	Channels, Clients int
	For               time.Duration
	// TTL is the longest that is asked for; the shortest is half of it. 0 stands for
	// 200 ms.
	TTL time.Duration
	// Early and Late are by how much the server's expiry may differ from the TTL that it
	// has told. 0 stands for 2 ms.
	Early, Late time.Duration
}

// Report is what a run has shown.
type Report struct {
	// Operations is how many were checked, expiries among them.
	Operations, Expiries int
	// Broken names the channels whose record no lock can have.
	Broken []string
	// Undecided names those that the checker gave up.
	Undecided []string
	// Errors are answers that none of the operations should have.
	Errors []error
}

// Right tells that the records are those of locks.
func (r Report) Right() bool { return len(r.Broken)+len(r.Undecided)+len(r.Errors) == 0 }

// String is one line with the number of operations and the verdict.
func (r Report) String() string {
	verdict := "linearizable"
	if !r.Right() {
		verdict = fmt.Sprintf("NOT a lock: broken %q, undecided %q, errors %v", r.Broken, r.Undecided, r.Errors)
	}
	return fmt.Sprintf("%d operations, %d of them expiries: %s", r.Operations, r.Expiries, verdict)
}

// Check runs clients on the backends that connect returns, one each, and fails t unless
// what they saw is what a lock does. It logs the number of operations and the verdict.
func Check(t testing.TB, connect func() dchannel.Backend, c Config) Report {
	r := Run(t.Context(), connect, c)
	t.Log("lock register:", r)
	if !r.Right() {
		t.Error("what the clients saw is not what a lock does")
	}
	return r
}

// Run is Check without a test.
func Run(ctx context.Context, connect func() dchannel.Backend, c Config) Report {
	def := func(d *time.Duration, to time.Duration) {
		if *d == 0 {
			*d = to
		}
	}
	def(&c.For, 5*time.Second)
	def(&c.TTL, 200*time.Millisecond)
	def(&c.Early, 2*time.Millisecond)
	def(&c.Late, 2*time.Millisecond)
	if c.Channels == 0 {
		c.Channels = 4
	}
	if c.Clients == 0 {
		c.Clients = 5
	}
	began := time.Now()
	recorders := make([]*recorder, c.Channels)
	var wg sync.WaitGroup
	for i := range recorders {
		recorders[i] = &recorder{c: c, began: began, grants: map[uint64]*grant{}}
	}
	for id := range c.Clients {
		b := connect()
		for i, rec := range recorders {
			ch := dchannel.New(fmt.Sprintf("locktest-%d-%d", began.UnixNano(), i), b)
			wg.Go(func() {
				(&client{rec: rec, ch: ch, id: id}).run(ctx)
				_ = ch.Detach()
			})
		}
	}
	wg.Wait()
	var r Report
	for i, rec := range recorders {
		history := rec.history()
		r.Operations += len(history)
		r.Expiries += rec.expiries
		r.Errors = append(r.Errors, rec.errs...)
		switch porcupine.CheckOperationsTimeout(model, history, time.Minute) {
		case porcupine.Illegal:
			r.Broken = append(r.Broken, fmt.Sprint("channel ", i))
		case porcupine.Unknown:
			r.Undecided = append(r.Undecided, fmt.Sprint("channel ", i))
		case porcupine.Ok:
		}
	}
	return r
}

// recorder is the record of one channel.
type recorder struct {
	c     Config
	began time.Time

	mu       sync.Mutex
	ops      []porcupine.Operation
	grants   map[uint64]*grant
	expiries int
	errs     []error
}

// grant is one generation, as its holder knows it.
type grant struct {
	from, to       time.Duration // when it runs out, if nothing else ends it
	granted, ended bool          // ended: it was released or forced
}

func (r *recorder) now() time.Duration { return time.Since(r.began) }

func (r *recorder) add(client int, call time.Duration, in input) {
	ret := r.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ops = append(r.ops, porcupine.Operation{ClientId: client, Input: in, Call: int64(call), Return: int64(ret)})
	g := r.grants[in.fence]
	if g == nil {
		g = &grant{}
		r.grants[in.fence] = g
	}
	switch in.op {
	case locked, extended:
		g.granted, g.from, g.to = true, call+in.ttl-r.c.Early, ret+in.ttl+r.c.Late
	case released, forced: // it may be forced before its holder has come to telling us
		g.ended = true
	}
}

// mayHave notes an extension whose effect is not known: the core took the hold to be over
// when the answer came.
func (r *recorder) mayHave(fence uint64, ttl time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if g := r.grants[fence]; g != nil {
		g.to = max(g.to, r.now()+ttl+r.c.Late)
	}
}

func (r *recorder) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.errs = append(r.errs, err)
}

// history returns the operations, with the expiries.
func (r *recorder) history() []porcupine.Operation {
	r.mu.Lock()
	defer r.mu.Unlock()
	for fence, g := range r.grants {
		if g.ended || !g.granted {
			continue
		}
		r.expiries++
		r.ops = append(r.ops, porcupine.Operation{
			ClientId: r.c.Clients, Input: input{op: expired, fence: fence}, Call: int64(g.from), Return: int64(g.to),
		})
	}
	return r.ops
}

// client is one of those who use a channel's lock.
type client struct {
	rec *recorder
	ch  *dchannel.Channel
	id  int
}

func (c *client) run(ctx context.Context) {
	for c.rec.now() < c.rec.c.For && ctx.Err() == nil {
		c.pause(c.rec.c.TTL / 8)
		call := c.rec.now()
		switch rand.N(6) {
		case 0:
			left, err := c.ch.LockedUntil(ctx)
			if c.bad("LockedUntil", err) {
				return
			}
			c.rec.add(c.id, call, input{op: read, held: left > 0})
		default:
			if !c.lock(ctx) {
				return
			}
		}
	}
}

func (c *client) lock(ctx context.Context) bool {
	ttl := c.rec.c.TTL/2 + rand.N(c.rec.c.TTL/2)
	call := c.rec.now()
	hold, err := c.ch.LockFor(ctx, ttl)
	var refusal *dchannel.LockedError
	switch {
	case errors.As(err, &refusal):
		c.rec.add(c.id, call, input{op: refused, fence: refusal.Fence})
		if rand.N(12) == 0 {
			call = c.rec.now()
			err := c.ch.ForceUnlock(ctx, refusal.Fence)
			if errors.Is(err, dchannel.ErrNotHeld) {
				c.rec.add(c.id, call, input{op: notHeld, fence: refusal.Fence})
			} else if !c.bad("ForceUnlock", err) {
				c.rec.add(c.id, call, input{op: forced, fence: refusal.Fence})
			}
		}
		return true
	case c.bad("LockFor", err):
		return false
	}
	fence := hold.Fence()
	c.rec.add(c.id, call, input{op: locked, fence: fence, ttl: hold.TTL()})
	for rand.N(3) > 0 {
		c.pause(ttl)
		if hold.Context().Err() != nil {
			break // the core would not ask the server
		}
		call = c.rec.now()
		_, err := hold.Extend(ctx, ttl)
		if errors.Is(err, dchannel.ErrNotHeld) {
			c.rec.mayHave(fence, ttl)
		} else if !c.bad("Extend", err) {
			c.rec.add(c.id, call, input{op: extended, fence: fence, ttl: hold.TTL()})
		}
	}
	c.pause(ttl * 3 / 2)
	call = c.rec.now()
	err = c.ch.CloseLockedUntil()
	if errors.Is(err, dchannel.ErrNotHeld) {
		c.rec.add(c.id, call, input{op: notHeld, fence: fence})
	} else if !c.bad("CloseLockedUntil", err) {
		c.rec.add(c.id, call, input{op: released, fence: fence})
	}
	return true
}

func (c *client) bad(call string, err error) bool {
	if err != nil {
		c.rec.fail(fmt.Errorf("%s: %w", call, err))
	}
	return err != nil
}

func (c *client) pause(d time.Duration) { time.Sleep(rand.N(d)) }
