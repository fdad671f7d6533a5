package conformance

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/dchannel/dchannel"
)

// history is the record of what publishers were told and what listeners got. Cases
// with faults record first and judge afterwards, as etcd's robustness tests do: under a
// fault almost any single answer is right, and only all of them together can be wrong.
type history struct {
	mu        sync.Mutex
	clock     int // orders events: what ended before another began has the smaller one
	published []*publication
	by        map[string]*publication
	listeners []*listening
	closes    []closeCall
}

// outcome is what a publisher was told.
type outcome uint8

const (
	pending outcome = iota
	accepted
	refused   // surely not sent
	uncertain // may or may not be in the order
)

type publication struct {
	publisher  string
	n          int // counts the publisher's messages
	payload    string
	begin, end int
	outcome    outcome
	err        error
}

type listening struct {
	name   string
	events []event
}

// event is what one Listen returned: a message, a loss, or the close.
type event struct {
	at      int
	payload string
	pos     dchannel.Position
	lost    *dchannel.LostError
	closed  bool
}

type closeCall struct {
	begin, end int
	ok         bool
}

func (l *history) tick() int {
	l.clock++
	return l.clock
}

func (l *history) begin(publisher string, n int) *publication {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &publication{publisher: publisher, n: n, payload: fmt.Sprintf("%s#%d", publisher, n), begin: l.tick()}
	if l.by == nil {
		l.by = map[string]*publication{}
	}
	l.by[p.payload] = p
	l.published = append(l.published, p)
	return p
}

func (l *history) end(p *publication, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p.end, p.err = l.tick(), err
	switch {
	case err == nil:
		p.outcome = accepted
	case errors.Is(err, dchannel.ErrUncertain):
		p.outcome = uncertain
	default:
		p.outcome = refused
	}
}

func (l *history) close(call func() error) error {
	l.mu.Lock()
	begin := l.tick()
	l.mu.Unlock()
	err := call()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closes = append(l.closes, closeCall{begin, l.tick(), err == nil})
	return err
}

func (l *history) listener(name string) *listening {
	for _, x := range l.listeners {
		if x.name == name {
			return x
		}
	}
	x := &listening{name: name}
	l.listeners = append(l.listeners, x)
	return x
}

func (l *history) got(name string, ev event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ev.at = l.tick()
	x := l.listener(name)
	x.events = append(x.events, ev)
}

func (l *history) count(name string, of func(event) bool) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, ev := range l.listener(name).events {
		if of(ev) {
			n++
		}
	}
	return n
}

func (l *history) losses(name string) int {
	return l.count(name, func(ev event) bool { return ev.lost != nil })
}

func (l *history) accepted() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.published {
		if p.outcome == accepted {
			n++
		}
	}
	return n
}

// record publishes message n of a publisher through h.
func (e *env) record(l *history, h Handle, publisher string, n int) error {
	return e.recordCall(l, publisher, n, h.Publish)
}

func (e *env) recordCall(l *history, publisher string, n int, publish func(context.Context, any) error) error {
	ctx, done := e.patient()
	defer done()
	p := l.begin(publisher, n)
	err := publish(ctx, p.payload)
	if e.ctx.Err() != nil {
		e.check()
	}
	l.end(p, err)
	return err
}

// collect records what h gets until enough, or the channel's close, or until nothing
// has come for as long as patience goes: then judge knows what is missing. Greetings
// are left out.
func (e *env) collect(l *history, h Handle, name string, enough func() bool) {
	for !enough() {
		ctx, done := e.patient()
		m, err := h.Next(ctx)
		done()
		var lost *dchannel.LostError
		switch {
		case err == nil:
			v, err := m.Value()
			if err != nil {
				e.fatalf("message %v: %v", m.Position, err)
			}
			l.got(name, event{payload: fmt.Sprint(v), pos: m.Position})
		case errors.As(err, &lost):
			l.got(name, event{lost: lost})
		case errors.Is(err, dchannel.ErrChanClosed):
			l.got(name, event{closed: true})
			return
		case e.ctx.Err() != nil:
			e.check()
			return
		case err == context.DeadlineExceeded: //nolint:errorlint // this very value is promised
			e.logf("listener %s got nothing more within %v", name, e.h.Patience)
			return
		default:
			e.fatalf("listener %s: %v", name, err)
		}
	}
}

// recordAll records n messages.
func (e *env) recordAll(l *history, h Handle, name string, n int) {
	want := n + l.count(name, func(ev event) bool { return ev.payload != "" })
	e.collect(l, h, name, func() bool {
		return l.count(name, func(ev event) bool { return ev.payload != "" }) >= want
	})
}

// recordTo records up to the given message.
func (e *env) recordTo(l *history, h Handle, name, payload string) {
	e.collect(l, h, name, func() bool {
		return l.count(name, func(ev event) bool { return ev.payload == payload }) > 0
	})
}

// recordAccepted records until all that was accepted has come.
func (e *env) recordAccepted(l *history, h Handle, name string) {
	e.collect(l, h, name, func() bool { return l.complete(name) })
}

// complete reports whether a listener has got, or knows that it has lost, as much as
// was accepted.
func (l *history) complete(name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	got := map[string]bool{}
	for _, ev := range l.listener(name).events {
		got[ev.payload] = true
	}
	for _, p := range l.published {
		if p.outcome == accepted && !got[p.payload] {
			return false
		}
	}
	return true
}

// judge fails the case if the history breaks a promise.
func (e *env) judge(l *history, c checks) {
	if vs := l.validate(c); len(vs) > 0 {
		text := fmt.Sprintf("the record of %d publishes breaks %d times what is promised:", len(l.published), len(vs))
		for i, v := range vs {
			if i == 8 {
				text += "\n\t…"
				break
			}
			text += "\n\t" + v.String()
		}
		e.fatalf("%s", text)
	}
}

// checks says what a history may contain.
type checks struct {
	// lossOK: more was published than is retained.
	lossOK bool
	// stateLost: the backend lost its state, once.
	stateLost bool
}

type violation struct{ guarantee, text string }

func (v violation) String() string { return v.guarantee + ": " + v.text }

// validate returns what the history breaks.
func (l *history) validate(c checks) (vs []violation) {
	l.mu.Lock()
	defer l.mu.Unlock()
	bad := func(guarantee, format string, args ...any) {
		vs = append(vs, violation{guarantee, fmt.Sprintf(format, args...)})
	}
	at := map[dchannel.Position]string{}    // what is there
	where := map[string]dchannel.Position{} // where it is
	for _, x := range l.listeners {
		l.validateListener(x, c, bad)
		for _, ev := range x.events {
			if ev.payload == "" {
				continue
			}
			if other, ok := at[ev.pos]; ok && other != ev.payload {
				bad("Order", "listener %s got %q at %v, another one %q", x.name, ev.payload, ev.pos, other)
			} else if other, ok := where[ev.payload]; ok && other != ev.pos {
				bad("ExactlyOnce", "%q is in the order twice, at %v and %v", ev.payload, ev.pos, other)
			}
			at[ev.pos], where[ev.payload] = ev.payload, ev.pos
		}
	}
	for _, x := range l.listeners {
		l.validateMissing(x, c, where, bad)
	}
	for _, cl := range l.closes {
		for _, p := range l.published {
			if cl.ok && p.outcome == accepted && p.begin > cl.end && !c.stateLost {
				bad("CloseRacesPublish", "Publish of %q returned nil after the channel had been closed", p.payload)
			}
		}
	}
	return vs
}

// validateListener looks at what one listener got, one after another.
func (l *history) validateListener(x *listening, c checks, bad func(guarantee, format string, args ...any)) {
	var last *dchannel.Position // nil: anything may follow
	seen := map[string]bool{}
	newest := map[string]int{}
	closed := false
	for _, ev := range x.events {
		switch {
		case closed && !ev.closed:
			bad("CloseFinal", "listener %s got %s after ErrChanClosed", x.name, ev)
		case ev.closed:
			closed = true
		case ev.lost != nil:
			last = l.validateLoss(x, ev.lost, last, c, bad)
		default:
			p := l.by[ev.payload]
			switch {
			case p == nil:
				bad("RoundTrip", "listener %s got %q, which nobody published", x.name, ev.payload)
			case p.outcome == refused:
				bad("Accepted", "listener %s got %q, and its Publish had said that it surely was not sent: %v", x.name, ev.payload, p.err)
			case seen[ev.payload]:
				bad("ExactlyOnce", "listener %s got %q twice", x.name, ev.payload)
			case p.n < newest[p.publisher]:
				bad("Order", "listener %s got %q after number %d of the same publisher", x.name, ev.payload, newest[p.publisher])
			}
			seen[ev.payload] = true
			if p != nil {
				newest[p.publisher] = max(newest[p.publisher], p.n)
			}
			switch {
			case last == nil:
			case ev.pos.Epoch != last.Epoch:
				bad("NoSilentLoss", "listener %s got %v after %v, another epoch, and no loss was reported", x.name, ev.pos, *last)
			case ev.pos.Seq <= last.Seq:
				bad("Order", "listener %s got %v after %v", x.name, ev.pos, *last)
			case ev.pos.Seq > last.Seq+1:
				bad("NoSilentLoss", "listener %s got %v after %v, and no loss was reported", x.name, ev.pos, *last)
			}
			pos := ev.pos
			last = &pos
		}
	}
}

func (ev event) String() string {
	switch {
	case ev.closed:
		return "ErrChanClosed"
	case ev.lost != nil:
		return fmt.Sprintf("a loss of %d after %v", ev.lost.Count, ev.lost.After)
	}
	return fmt.Sprintf("%q at %v", ev.payload, ev.pos)
}

// validateLoss returns the place behind the loss, if it is known.
func (l *history) validateLoss(x *listening, lost *dchannel.LostError, last *dchannel.Position, c checks,
	bad func(guarantee, format string, args ...any),
) *dchannel.Position {
	switch {
	case lost.Count == 0 && c.stateLost:
		return nil
	case lost.Count == 0, !c.lossOK:
		bad("NoSilentLoss", "listener %s was told of a loss of %d, where there was no reason for one: %v", x.name, lost.Count, lost)
	case last != nil && lost.After != *last:
		bad("NoSilentLoss", "listener %s was told of a loss after %v, but what it got last was %v", x.name, lost.After, *last)
	case lost.Next != (dchannel.Position{Epoch: lost.After.Epoch, Seq: lost.After.Seq + lost.Count + 1}):
		bad("NoSilentLoss", "listener %s was told of a loss of %d between %v and %v", x.name, lost.Count, lost.After, lost.Next)
	}
	return &dchannel.Position{Epoch: lost.Next.Epoch, Seq: lost.Next.Seq - 1}
}

// validateMissing looks for what was accepted and did not come.
func (l *history) validateMissing(x *listening, c checks, where map[string]dchannel.Position,
	bad func(guarantee, format string, args ...any),
) {
	got := map[string]bool{}
	closed := false
	lostAt, unseen := 0, uint64(0)
	var losses []*dchannel.LostError
	for _, ev := range x.events {
		got[ev.payload] = true
		closed = closed || ev.closed
		if ev.lost != nil {
			losses = append(losses, ev.lost)
			unseen += ev.lost.Count
			if ev.lost.Count == 0 {
				lostAt = ev.at
			}
		}
	}
	for _, p := range l.published {
		if p.outcome != accepted || got[p.payload] || c.stateLost && p.begin < lostAt {
			continue
		}
		pos, elsewhere := where[p.payload]
		told := false
		for _, lost := range losses {
			told = told || elsewhere && lost.Count > 0 && pos.Epoch == lost.After.Epoch && pos.Seq > lost.After.Seq && pos.Seq < lost.Next.Seq
		}
		if !told && !elsewhere && unseen > 0 { // nobody got it, so nobody knows its place
			unseen--
			told = true
		}
		switch {
		case told:
		case elsewhere:
			bad("NoSilentLoss", "listener %s did not get %q at %v, which others got, and was told of no loss", x.name, p.payload, pos)
		case closed && l.closedAfter(p):
			bad("CloseDrains", "listener %s got ErrChanClosed without %q, which was accepted before the close", x.name, p.payload)
		case closed:
			bad("CloseRacesPublish", "Publish of %q returned nil, and listener %s got ErrChanClosed without it", p.payload, x.name)
		default:
			bad("Accepted", "Publish of %q returned nil, and listener %s did not get it, nor did another", p.payload, x.name)
		}
	}
}

// closedAfter reports whether every close began when p had been accepted.
func (l *history) closedAfter(p *publication) bool {
	for _, cl := range l.closes {
		if cl.begin < p.end {
			return false
		}
	}
	return len(l.closes) > 0
}
