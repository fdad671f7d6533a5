package conformance

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/dchannel/dchannel"
)

var faults = []guarantee{
	{
		name: "Cut",
		rule: "connections reset, again and again: during and after it everything holds, " +
			"a listener that was cut off loses nothing, and Status says what is going on",
		cases: []testCase{{"Resets", cut}},
	},
	{
		name: "Blackhole",
		rule: "packets vanish on open connections: during and after it everything holds, " +
			"a listener loses nothing, and Status says what is going on",
		cases: []testCase{{"Silence", blackhole}},
	},
	{
		name:  "Pause",
		rule:  "the server stands still for a while: during and after it everything holds, and nothing is lost",
		cases: []testCase{{"Stopped", pause}},
		alone: true,
	},
	{
		name: "Restart",
		rule: "the server ends, cleanly or by kill -9, and comes back with its data: during and after it everything holds, and nothing is lost",
		cases: []testCase{
			{"Clean", func(e *env) { restart(e, false) }},
			{"Kill", func(e *env) { restart(e, true) }},
		},
		alone: true,
	},
	{
		name: "StateLoss",
		rule: "the server loses its state: every listener is told, by a LostError of unknown count, " +
			"and what is published afterwards arrives, in a new epoch",
		cases: []testCase{
			{"Told", stateLoss},
			{"Cut", stateLossWhileCut},
		},
		alone: true,
	},
}

// storm is a channel of two processes, with listeners and publishers on each that
// go on while faults come and go.
type storm struct {
	e         *env
	log       history
	listeners []Handle
	publish   [2]func() // stops that process's publisher
	next      [2]int
}

func newStorm(e *env, a, b dchannel.Backend) *storm {
	s := &storm{e: e}
	s.listeners = e.attach(e.name("storm"), a, b)
	return s
}

// run makes a process publish, message after message, until stop; in and out of
// faults.
func (s *storm) run(process int) {
	stop, stopped := make(chan struct{}), make(chan struct{})
	s.publish[process] = sync.OnceFunc(func() {
		close(stop)
		select {
		case <-stopped:
		case <-s.e.ctx.Done():
			s.e.check()
		}
	})
	s.e.start(func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-s.e.ctx.Done():
				return
			default:
			}
			s.one(process, s.next[process]%7 == 3)
			s.e.sleep(2 * time.Millisecond) // so that retention has everything
		}
	})
}

// one publishes a message, sometimes with little time.
func (s *storm) one(process int, hasty bool) {
	e := s.e
	n := s.next[process]
	s.next[process]++
	_ = e.recordCall(&s.log, fmt.Sprint("p", process), n, func(ctx context.Context, v any) error {
		if hasty {
			short, done := context.WithTimeout(ctx, 20*time.Millisecond)
			defer done()
			ctx = short
		}
		return s.listeners[process].Publish(ctx, v)
	})
}

// finish stops all, sees to it that everything has come, closes the channel, and
// judges.
func (s *storm) finish() {
	e := s.e
	for _, stop := range s.publish {
		if stop != nil {
			stop()
		}
	}
	// Nothing is published any more that could show what is missing.
	var turns []func()
	for i, h := range s.listeners {
		turns = append(turns, func() { e.recordAccepted(&s.log, h, fmt.Sprint("l", i)) })
	}
	e.all(turns...)
	e.judge(&s.log, checks{}) // the close would show what is missing, and bring it
	if err := s.log.close(s.listeners[0].Close); err != nil {
		e.fatalf("Close after the fault: %v", err)
	}
	turns = nil
	for i, h := range s.listeners {
		turns = append(turns, func() { e.collect(&s.log, h, fmt.Sprint("l", i), func() bool { return false }) })
	}
	e.all(turns...)
	for i, h := range s.listeners {
		if !h.IsClosed() {
			e.fatalf("listener %d does not learn of the close after the fault", i)
		}
	}
	n := s.log.accepted()
	e.logf("%d messages published, %d accepted, the rest refused or uncertain", len(s.log.published), n)
	e.judge(&s.log, checks{})
}

// interrupted waits until the handle's Status tells of the fault.
func (s *storm) interrupted(h Handle) {
	s.e.eventually(func() bool { return h.Status().State == dchannel.StateInterrupted },
		"Status of a handle that is cut off says interrupted: %v", lazily(func() any { return fmt.Sprintf("%+v", h.Status()) }))
}

func (s *storm) live(h Handle) {
	s.e.eventually(func() bool { return h.Status().State == dchannel.StateLive },
		"Status says live again: %v", lazily(func() any { return fmt.Sprintf("%+v", h.Status()) }))
}

func cut(e *env) {
	e.need(e.h.Cut != nil, "Cut")
	a, b := e.backend(), e.backend()
	s := newStorm(e, a, b)
	s.run(0)
	s.run(1)
	for i := range 6 {
		e.sleep(20 * time.Millisecond)
		heal := e.once(e.h.Cut(e.tb, []dchannel.Backend{a, b}[i%2]))
		if i == 3 {
			s.interrupted(s.listeners[1])
		}
		if i < 4 { // the others are resets without a pause
			e.sleep(30 * time.Millisecond)
		}
		heal()
	}
	// At last only the other one publishes, so that nothing tells the listener that was
	// cut off what it missed.
	s.publish[1]()
	heal := e.once(e.h.Cut(e.tb, b))
	e.sleep(50 * time.Millisecond)
	s.publish[0]()
	s.one(0, false)
	heal()
	s.live(s.listeners[1])
	s.finish()
}

func blackhole(e *env) {
	e.need(e.h.Blackhole != nil, "Blackhole")
	a, b := e.backend(), e.backend()
	s := newStorm(e, a, b)
	s.run(0)
	s.run(1)
	e.sleep(20 * time.Millisecond)
	heal := e.once(e.h.Blackhole(e.tb, b))
	s.interrupted(s.listeners[1])
	heal()
	s.live(s.listeners[1])

	s.publish[1]()
	heal = e.once(e.h.Blackhole(e.tb, b))
	e.sleep(50 * time.Millisecond)
	s.publish[0]()
	s.one(0, false)
	s.interrupted(s.listeners[1])
	heal()
	s.finish()
}

func pause(e *env) {
	e.need(e.h.Pause != nil, "Pause")
	a, b := e.backend(), e.backend()
	s := newStorm(e, a, b)
	s.run(0)
	s.run(1)
	for range 2 {
		e.sleep(20 * time.Millisecond)
		resume := e.once(e.h.Pause(e.tb))
		e.sleep(200 * time.Millisecond)
		resume()
	}
	s.finish()
}

func restart(e *env, kill bool) {
	e.need(e.h.Restart != nil, "Restart")
	a, b := e.backend(), e.backend()
	s := newStorm(e, a, b)
	closed := e.attach(e.name("closed"), a)[0]
	if err := closed.Close(); err != nil {
		e.fatalf("Close: %v", err)
	}
	s.run(0)
	s.run(1)
	for range 2 {
		e.sleep(20 * time.Millisecond)
		start := e.once(e.h.Restart(e.tb, kill))
		e.sleep(50 * time.Millisecond)
		start()
	}
	e.sleep(20 * time.Millisecond)
	s.publish[1]()
	s.publish[0]()
	start := e.once(e.h.Restart(e.tb, kill))
	start()
	s.live(s.listeners[0])
	s.live(s.listeners[1])
	s.one(0, false)
	s.finish()
	if !e.isClosedFor(b, closed.Name()) {
		e.fatalf("the channel that was closed before is open")
	}
}

func stateLoss(e *env) {
	e.need(e.h.LoseState != nil, "LoseState")
	a, b := e.backend(), e.backend()
	s := newStorm(e, a, b)
	for range 20 {
		s.one(0, false)
	}
	for i, h := range s.listeners {
		e.recordAccepted(&s.log, h, fmt.Sprint("l", i))
	}
	before := s.listeners[0].Status().Position
	e.h.LoseState(e.tb)
	e.publishAnew(s, before)
	if fresh := e.open(b, s.listeners[0].Name()); fresh.IsClosed() {
		e.fatalf("the channel is closed after a loss of state")
	}
	e.judge(&s.log, checks{stateLost: true})
}

// publishAnew publishes after a loss of state and checks that each listener is told
// of it, once, before it gets what is new.
func (e *env) publishAnew(s *storm, before dchannel.Position) {
	// A publish may find the connection broken; then it is tried again.
	e.eventually(func() bool {
		s.one(0, false)
		return s.log.published[len(s.log.published)-1].outcome == accepted
	}, "Publish returns nil after the loss of state")
	for range 5 {
		s.one(1, false)
	}
	for i, h := range s.listeners {
		name := fmt.Sprint("l", i)
		n := s.log.losses(name)
		e.collect(&s.log, h, name, func() bool { return s.log.completeFrom(name, before.Epoch) })
		if got := s.log.losses(name) - n; got != 1 {
			e.fatalf("listener %s was told %d times of a loss of state, want once", name, got)
		}
		if at := h.Status().Position; at.Epoch == before.Epoch {
			e.fatalf("after the loss of state the epoch is still %d", at.Epoch)
		}
		ctx, done := context.WithTimeout(e.ctx, settle)
		_, err := h.Next(ctx)
		done()
		var lost *dchannel.LostError
		if errors.As(err, &lost) {
			e.fatalf("listener %s was told twice: %v", name, err)
		}
	}
}

// completeFrom is complete for what was accepted last, in a new epoch.
func (l *history) completeFrom(name string, old uint64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	x := l.listener(name)
	if len(x.events) == 0 {
		return false
	}
	last := l.published[len(l.published)-1]
	ev := x.events[len(x.events)-1]
	return ev.payload == last.payload && ev.pos.Epoch != old
}

// stateLossWhileCut: the state goes while a listener is cut off, and what it comes
// back to looks like the same place.
func stateLossWhileCut(e *env) {
	e.need(e.h.LoseState != nil, "LoseState")
	e.need(e.h.Cut != nil, "Cut")
	a, b := e.backend(), e.backend()
	s := newStorm(e, a, b)
	for range 6 {
		s.one(0, false)
	}
	for i, h := range s.listeners {
		e.recordAccepted(&s.log, h, fmt.Sprint("l", i))
	}
	before := s.listeners[0].Status().Position
	heal := e.once(e.h.Cut(e.tb, b))
	e.h.LoseState(e.tb)
	e.eventually(func() bool {
		s.one(0, false)
		return s.log.published[len(s.log.published)-1].outcome == accepted
	}, "Publish returns nil after the loss of state")
	for range 10 { // the numbers pass the listener's
		s.one(0, false)
	}
	heal()
	e.publishAnew(s, before)
	e.judge(&s.log, checks{stateLost: true})
}
