package nats

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	natsgo "github.com/nats-io/nats.go"
)

// wire sends requests and collects their answers. The client's own Request would
// not do: it takes one answer and not many, it does not notice that the connection
// broke under a request, and it takes the connection's lock, which a write to a
// dead peer holds for up to a minute. So every call of the client that may block
// is made by one goroutine, and nobody waits for that longer than their context.
type wire struct {
	conn   *natsgo.Conn
	prefix string // of the subjects that answers come to, with the dot

	mu      sync.Mutex
	down    error // why requests cannot be sent now; nil when they can
	ended   bool  // for good
	pending map[string]*call
	next    uint64

	queue queue
	stop  chan struct{}
}

// answerTimeout bounds the wait for the next answer on a connection that is fine: a
// stream without a leader does not answer at all.
const answerTimeout = 5 * time.Second

func newWire(conn *natsgo.Conn) *wire {
	return &wire{conn: conn, prefix: conn.NewInbox() + ".", pending: make(map[string]*call), down: errNotConnected,
		queue: queue{wake: make(chan struct{}, 1)}, stop: make(chan struct{})}
}

// call is one request under way.
type call struct {
	msg  *natsgo.Msg
	last func(*natsgo.Msg) bool
	done chan struct{}

	state   atomic.Int32
	seen    atomic.Int64 // answers so far
	before  error        // the connection's last error when it was sent
	answers []*natsgo.Msg
	err     error // this and answers are written before done is closed
}

// What becomes of a call. It is decided once whether it is sent: by the queue's
// goroutine, or by who no longer waits.
const (
	queued int32 = iota
	sent
	unsent // and never will be, or surely not taken
)

// one is for requests that have one answer.
func one(*natsgo.Msg) bool { return true }

// batch is for direct gets with many answers: the end is an empty message with a
// status, 204 or an error.
func batch(m *natsgo.Msg) bool { return status(m) != "" }

func status(m *natsgo.Msg) string {
	if len(m.Data) > 0 || len(m.Header) == 0 {
		return ""
	}
	if v := m.Header["Status"]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// start makes a request; wait gets its answers. In between, others can be started:
// the server answers those of one connection in order.
func (w *wire) start(msg *natsgo.Msg, last func(*natsgo.Msg) bool) *call {
	c := &call{msg: msg, last: last, done: make(chan struct{})}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.down != nil {
		c.err = w.down
		close(c.done)
		return c
	}
	w.next++
	msg.Reply = w.prefix + strconv.FormatUint(w.next, 36)
	w.pending[msg.Reply] = c
	w.queue.add(func() { w.send(c) })
	return c
}

// send runs on the queue's goroutine.
func (w *wire) send(c *call) {
	c.before = w.conn.LastError()
	if !c.state.CompareAndSwap(queued, sent) {
		return
	}
	err := w.conn.PublishMsg(c.msg)
	if err == nil {
		return
	}
	for _, refused := range []error{
		natsgo.ErrConnectionClosed, natsgo.ErrConnectionDraining, natsgo.ErrMaxPayload,
		natsgo.ErrReconnectBufExceeded, natsgo.ErrHeadersNotSupported, natsgo.ErrBadSubject,
	} {
		if errors.Is(err, refused) {
			c.state.Store(unsent)
		}
	}
	w.finish(c, err)
}

// finish ends a call without (further) answers.
func (w *wire) finish(c *call, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.pending[c.msg.Reply]; ok {
		delete(w.pending, c.msg.Reply)
		c.err = err
		close(c.done)
	}
}

// wait returns the answers. maybe says, when there is an error, that the request
// may have reached the server.
func (w *wire) wait(ctx context.Context, c *call) (answers []*natsgo.Msg, maybe bool, err error) {
	// A permission that is missing is never answered: it shows only in the
	// connection's last error.
	const tick = 250 * time.Millisecond
	timer := time.NewTimer(tick)
	defer timer.Stop()
	seen, quiet := int64(-1), time.Duration(0)
	for {
		select {
		case <-c.done:
			return c.answers, c.state.Load() == sent, c.err
		case <-ctx.Done():
			c.state.CompareAndSwap(queued, unsent)
			w.finish(c, ctx.Err())
		case <-timer.C:
			timer.Reset(tick)
			if n := c.seen.Load(); n != seen {
				seen, quiet = n, 0
			}
			if quiet += tick; quiet >= answerTimeout {
				c.state.CompareAndSwap(queued, unsent)
				w.finish(c, errNoAnswer)
				continue
			}
			w.queue.add(func() { w.lookForRefusal(c) })
		}
	}
}

// lookForRefusal runs on the queue's goroutine.
func (w *wire) lookForRefusal(c *call) {
	if c.state.Load() != sent {
		return
	}
	if err := refusal(w.conn, c.before, c.msg.Subject); err != nil {
		w.finish(c, err)
	}
}

// refusal returns the connection's last error if it is a new one and says that
// subject is not permitted. Each one is a value of its own, and so `before` tells.
func refusal(conn *natsgo.Conn, before error, subject string) error {
	err := conn.LastError()
	same := before == err //nolint:errorlint // this very value, not the like of it
	if err == nil || same || !errors.Is(err, natsgo.ErrPermissionViolation) || !strings.Contains(err.Error(), `"`+subject+`"`) {
		return nil
	}
	return fmt.Errorf("nats: not permitted: %q: %w", subject, natsgo.ErrPermissionViolation)
}

// drop is for who no longer wants the answers.
func (w *wire) drop(c *call) {
	c.state.CompareAndSwap(queued, unsent)
	w.finish(c, context.Canceled)
}

// roundTrip is start and wait.
func (w *wire) roundTrip(ctx context.Context, msg *natsgo.Msg, last func(*natsgo.Msg) bool) ([]*natsgo.Msg, bool, error) {
	if err := ctx.Err(); err != nil {
		return nil, false, err
	}
	return w.wait(ctx, w.start(msg, last))
}

// answer takes every message that comes to the answer subjects.
func (w *wire) answer(m *natsgo.Msg) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c, ok := w.pending[m.Subject]
	if !ok {
		return
	}
	c.answers = append(c.answers, m)
	c.seen.Add(1)
	if !c.last(m) {
		return
	}
	delete(w.pending, m.Subject)
	if status(m) == "503" {
		c.err = natsgo.ErrNoResponders
		c.state.Store(unsent) // the server says that nobody was there to take it
	}
	close(c.done)
}

// setDown lets requests through (nil), or fails them all: those under way with cut.
func (w *wire) setDown(why, cut error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.ended {
		w.fail(why, cut)
	}
}

// end is setDown for good.
func (w *wire) end(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fail(err, err)
	w.ended = true
	close(w.stop)
}

func (w *wire) fail(why, cut error) {
	w.down = why
	if why == nil {
		return
	}
	for reply, c := range w.pending {
		c.state.CompareAndSwap(queued, unsent)
		c.err = cut
		delete(w.pending, reply)
		close(c.done)
	}
}

// isDown returns why requests cannot be sent now.
func (w *wire) isDown() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.down
}

// queue holds what one goroutine does, in order. Adding never blocks.
type queue struct {
	mu    sync.Mutex
	items []func()
	wake  chan struct{}
}

func (q *queue) add(f func()) {
	q.mu.Lock()
	q.items = append(q.items, f)
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// run works until stop is closed, and through what is queued by then.
func (q *queue) run(stop <-chan struct{}) {
	var spare []func()
	for {
		q.mu.Lock()
		work := q.items
		q.items = spare[:0]
		q.mu.Unlock()
		for i, f := range work {
			f()
			work[i] = nil
		}
		spare = work
		if len(work) > 0 {
			continue
		}
		select {
		case <-q.wake:
		case <-stop:
			q.mu.Lock()
			rest := len(q.items)
			q.mu.Unlock()
			if rest == 0 {
				return
			}
		}
	}
}
