package conformance

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/dchannel/dchannel"
)

var closing = []guarantee{
	{
		name:  "CloseWakes",
		rule:  "every blocked Listen in every process returns ErrChanClosed (one network hop, not a poll)",
		cases: []testCase{{"Blocked", closeWakes}},
	},
	{
		name: "CloseDrains",
		rule: "what was accepted before the close is delivered first",
		cases: []testCase{
			{"Unread", closeDrains},
			{"Async", closeDrainsAsync},
		},
	},
	{
		name: "CloseRacesPublish",
		rule: "a publish that races a close is either delivered before it or returns ErrChanClosed; never nil and gone",
		cases: []testCase{
			{"Race", closeRacesPublish},
			{"After", publishAfterClose},
		},
	},
	{
		name: "CloseDurable",
		rule: "who attaches later, and who was cut off during the close, learns of it; " +
			"the marker outlives the messages and then disappears by itself",
		cases: []testCase{
			{"Late", closeSeenLate},
			{"CutOff", closeSeenAfterCut},
			{"Keep", closeKept},
		},
	},
	{
		name: "CloseFinal",
		rule: "a handle that saw the close stays closed; a user's own message never looks like a close",
		cases: []testCase{
			{"Stays", closeStays},
			{"Lookalike", closeLookalike},
		},
	},
	{
		name:  "CloseIdempotent",
		rule:  "closing again is nil",
		cases: []testCase{{"Again", closeAgain}},
	},
	{
		name: "Cleanup",
		rule: "everything the library writes to a backend expires by itself; an idle channel leaves nothing behind; " +
			"an explicit call removes a channel's state at once",
		cases: []testCase{
			{"Remove", cleanupRemove},
			{"Idle", cleanupIdle},
			{"Eternal", cleanupEternal},
		},
	},
}

func closeWakes(e *env) {
	a, b := e.backend(), e.backend()
	best := time.Duration(1<<63 - 1)
	for i := 0; i < 10 && best > promptly; i++ {
		hs := e.attach(e.name(fmt.Sprint("wake", i)), a, a, b, b)
		woken := make(chan time.Time, len(hs))
		for _, h := range hs {
			e.start(func() {
				e.expectClosed(h)
				woken <- time.Now()
			})
		}
		e.sleep(settle) // let them block; one that did not is woken as well
		began := time.Now()
		if err := hs[0].Close(); err != nil {
			e.fatalf("Close: %v", err)
		}
		var last time.Time
		for range hs {
			select {
			case last = <-woken:
			case <-e.ctx.Done():
				e.check()
			}
		}
		best = min(best, last.Sub(began))
		for _, h := range hs {
			if !h.IsClosed() {
				e.fatalf("Listen has returned ErrChanClosed, and IsClosed is false")
			}
			select {
			case <-h.Done():
			case <-time.After(e.h.Patience):
				e.fatalf("Listen has returned ErrChanClosed, and Done is not closed")
			}
		}
	}
	if best > promptly {
		e.fatalf("Close took %v to wake all who listen, at best; want at most %v", best, promptly)
	}
}

func closeDrains(e *env) {
	a, b := e.backend(), e.backend()
	hs := e.attach(e.name("drain"), a, a, b)
	want := e.publishMany(hs[0], "before the close", 100)
	if err := hs[1].Close(); err != nil {
		e.fatalf("Close: %v", err)
	}
	e.eventually(hs[2].IsClosed, "the other process knows of the close")
	for _, h := range hs {
		e.expect(h, want...)
		e.expectClosed(h)
	}
}

func closeDrainsAsync(e *env) {
	a, b := e.backend(), e.backend()
	hs := e.attach(e.name("drain"), a, b)
	var want []any
	for i := range 100 {
		want = append(want, fmt.Sprint("queued ", i))
		if err := hs[0].PublishAsync(e.ctx, want[i]); err != nil {
			e.fatalf("PublishAsync: %v", err)
		}
	}
	if err := hs[0].Close(); err != nil {
		e.fatalf("Close: %v", err)
	}
	for _, h := range hs {
		e.expect(h, want...)
		e.expectClosed(h)
	}
	if err := hs[0].Flush(e.ctx); err != nil {
		e.fatalf("Flush of what was queued before the close: %v", err)
	}
}

func closeRacesPublish(e *env) {
	a, b := e.backend(), e.backend()
	for round := range 15 {
		hs := e.attach(e.name(fmt.Sprint("race", round)), a, b)
		var log history
		closed := make(chan struct{})
		turns := []func(){
			func() {
				e.sleep(time.Duration(round) * 100 * time.Microsecond)
				if err := log.close(hs[round%2].Close); err != nil {
					e.fatalf("Close: %v", err)
				}
				close(closed)
			},
		}
		for i, h := range hs {
			turns = append(turns, func() { e.collect(&log, h, fmt.Sprint("l", i), func() bool { return false }) })
			for p := range 2 {
				turns = append(turns, func() {
					own := e.handle([]dchannel.Backend{a, b}[i], h.Name())
					for n, after := 0, 0; ; n++ {
						err := e.record(&log, own, fmt.Sprint("p", i, p), n)
						if errors.Is(err, dchannel.ErrChanClosed) {
							return
						}
						if err != nil {
							e.fatalf("a publish that races a close: %v", err)
						}
						select {
						case <-closed:
							if after++; after > 20 {
								e.fatalf("the channel is closed, and Publish goes on returning nil")
							}
						default:
						}
						if n%10 == 9 { // retention must have it all, however fast the server is
							e.sleep(100 * time.Microsecond)
						}
					}
				})
			}
		}
		e.all(turns...)
		e.judge(&log, checks{})
	}
}

func publishAfterClose(e *env) {
	a, b := e.backend(), e.backend()
	h := e.attach(e.name("after"), a)[0]
	other, late := e.handle(b, h.Name()), e.handle(b, h.Name())
	e.publish(other, "before")
	if err := h.Close(); err != nil {
		e.fatalf("Close: %v", err)
	}
	for _, p := range []Handle{h, other, late} {
		e.expectErr("Publish on a closed channel", p.Publish(e.ctx, "after"), dchannel.ErrChanClosed)
	}
	async := e.handle(b, h.Name())
	err := async.PublishAsync(e.ctx, "after")
	if err == nil {
		err = async.Flush(e.ctx)
	}
	e.expectErr("Flush of a message to a closed channel", err, dchannel.ErrChanClosed)
	e.expect(h, "before")
	e.expectClosed(h)
}

func closeSeenLate(e *env) {
	a := e.backend()
	h := e.attach(e.name("late"), a)[0]
	e.publish(h, "before")
	if err := h.Close(); err != nil {
		e.fatalf("Close: %v", err)
	}
	e.sleep(800 * time.Millisecond) // for a marker that does not last
	for _, b := range []dchannel.Backend{a, e.backend()} {
		if late := e.handle(b, h.Name()); !late.IsClosed() {
			e.fatalf("IsClosed of a late handle is false; its status is %+v", late.Status())
		}
		late := e.open(b, h.Name())
		e.expectClosed(late)
		if !late.IsClosed() {
			e.fatalf("Listen has returned ErrChanClosed, and IsClosed is false")
		}
		lazy := e.handle(b, h.Name())
		select {
		case <-lazy.Done():
		case <-time.After(e.h.Patience):
			e.fatalf("Done of a late handle is not closed")
		}
		oldest := e.open(b, h.Name(), dchannel.WithStart(dchannel.FromOldest()))
		e.expectGreeted(oldest, "before")
		e.expectClosed(oldest)
	}
}

func closeSeenAfterCut(e *env) {
	e.need(e.h.Cut != nil, "Cut")
	a, b := e.backend(), e.backend()
	hs := e.attach(e.name("cut"), a, b)
	heal := e.once(e.h.Cut(e.tb, b))
	e.publish(hs[0], "before")
	if err := hs[0].Close(); err != nil {
		e.fatalf("Close: %v", err)
	}
	heal()
	e.expect(hs[1], "before")
	e.expectClosed(hs[1])
}

func closeKept(e *env) {
	e.need(e.h.Short != nil, "Short")
	s := e.h.Short
	a, b := e.short(), e.short()
	name := e.name("kept")
	keep := s.Retention + time.Second
	began := time.Now()
	h := e.handle(a, name, dchannel.WithCloseKeep(keep))
	e.publish(h, "x")
	if err := h.Close(); err != nil {
		e.fatalf("Close: %v", err)
	}
	closed := time.Now()
	for e.ctx.Err() == nil {
		now := time.Now()
		if !e.isClosedFor(b, name) {
			if old := time.Since(closed); now.Sub(began) < keep && old < keep {
				e.fatalf("the close was forgotten after %v, want %v", old, keep)
			}
			break
		}
		if now.Sub(closed) > keep+s.Gone+e.h.Patience {
			e.fatalf("the close is remembered after %v; it was to be kept for %v", now.Sub(closed), keep)
		}
		e.sleep(100 * time.Millisecond)
	}
	e.attach(name, b) // it is a channel like any other now
}

// isClosedFor asks the backend, by a handle that knows nothing yet.
func (e *env) isClosedFor(b dchannel.Backend, name string) bool {
	h := e.handle(b, name, dchannel.WithTimeout(e.h.Patience))
	closed := h.IsClosed()
	if reason := h.Status().Reason; !closed && reason != nil {
		e.fatalf("IsClosed: %v", reason)
	}
	_ = h.Detach() // nothing was published
	return closed
}

func closeStays(e *env) {
	a, b := e.backend(), e.backend()
	hs := e.attach(e.name("stays"), a, b)
	if err := hs[0].Close(); err != nil {
		e.fatalf("Close: %v", err)
	}
	e.expectClosed(hs[0])
	e.expectClosed(hs[1])
	for round := range 2 {
		for range 10 {
			for _, h := range hs {
				if !h.IsClosed() {
					e.fatalf("IsClosed is false again")
				}
				e.expectClosed(h)
				e.expectErr("Publish after the close was seen", h.Publish(e.ctx, "x"), dchannel.ErrChanClosed)
				select {
				case <-h.Done():
				default:
					e.fatalf("Done is open again")
				}
			}
		}
		if round == 0 { // and now the backend forgets
			if err := dchannel.Remove(e.ctx, hs[0].Name(), a); err != nil {
				e.fatalf("Remove: %v", err)
			}
		}
	}
	if err := hs[0].Detach(); err != nil {
		e.fatalf("Detach: %v", err)
	}
	if !hs[0].IsClosed() {
		e.fatalf("IsClosed is false after Detach")
	}
}

func closeLookalike(e *env) {
	a, b := e.backend(), e.backend()
	hs := e.attach(e.name("magic"), a, b)
	var all []any
	for _, s := range []string{
		"", "close", "closed", "CLOSE", "__close__", "dchannel:close", "dchannel.close", "EOF", "\x00", "\x04",
		"close-marker", "tombstone", dchannel.ErrChanClosed.Error(), `{"closed":true}`, `{"type":"close"}`, "1-1 close", strings.Repeat("\x00", 16),
	} {
		all = append(all, s, []byte(s))
	}
	for _, v := range all {
		e.publish(hs[0], v)
	}
	e.publish(hs[0], map[string]any{"closed": true})
	e.publish(hs[0], nil)
	for _, h := range hs {
		e.expect(h, all...)
		e.expect(h, map[string]any{"closed": true}, nil)
		if h.IsClosed() {
			e.fatalf("a message has closed the channel")
		}
	}
	e.nothingElse(hs[0], hs...)
}

func closeAgain(e *env) {
	a, b := e.backend(), e.backend()
	name := e.name("again")
	hs := e.attach(name, a, b)
	for _, h := range []Handle{hs[0], hs[0], hs[1], e.handle(b, name), e.handle(a, name), e.handle(e.backend(), name)} {
		if err := h.Close(); err != nil {
			e.fatalf("Close of a closed channel: %v", err)
		}
	}
	if err := hs[0].CloseLockedUntil(); err != nil {
		e.fatalf("CloseLockedUntil, which nobody began: %v", err)
	}
	many := e.name("many")
	ms := e.attach(many, a, b)
	var turns []func()
	for i := range 20 {
		turns = append(turns, func() {
			h := ms[i%2]
			if i >= 10 {
				h = e.handle([]dchannel.Backend{a, b}[i%2], many)
			}
			if err := h.CloseContext(context.WithoutCancel(e.ctx)); err != nil {
				e.fatalf("one of %d closes at once: %v", 20, err)
			}
		})
	}
	e.all(turns...)
	e.expectClosed(ms[0])
	e.expectClosed(ms[1])
}

func cleanupRemove(e *env) {
	a, b := e.backend(), e.backend()
	name := e.name("remove")
	if err := dchannel.Remove(e.ctx, name, a); err != nil {
		e.fatalf("Remove of a channel that never was: %v", err)
	}
	h := e.attach(name, a)[0]
	e.publishMany(h, "m", 5)
	if _, ok := a.(dchannel.Locker); ok {
		e.lock(h, time.Minute)
	}
	if err := h.Close(); err != nil {
		e.fatalf("Close: %v", err)
	}
	if err := h.Detach(); err != nil {
		e.fatalf("Detach: %v", err)
	}
	if err := dchannel.Remove(e.ctx, name, b); err != nil {
		e.fatalf("Remove: %v", err)
	}
	if e.h.Holds != nil {
		if held := e.h.Holds(e.tb, name); len(held) > 0 {
			e.fatalf("after Remove the server holds %q", held)
		}
	}
	if e.isClosedFor(a, name) || e.isClosedFor(b, name) {
		e.fatalf("the channel is closed after Remove")
	}
	fresh := e.open(b, name, dchannel.WithStart(dchannel.FromOldest()))
	e.publish(fresh, "anew")
	e.expect(fresh, "anew")
}

func cleanupIdle(e *env) {
	e.need(e.h.Short != nil, "Short")
	e.need(e.h.Holds != nil, "Holds")
	b := e.short()
	open, closed := e.name("open"), e.name("closed")
	e.publishMany(e.attach(open, b)[0], "m", 5)
	h := e.attach(closed, b)[0]
	e.publishMany(h, "m", 5)
	short := e.handle(b, closed, dchannel.WithCloseKeep(time.Second))
	if err := short.Close(); err != nil {
		e.fatalf("Close: %v", err)
	}
	e.sleep(e.h.Short.Gone)
	for _, name := range []string{open, closed} {
		var held []string
		e.eventually(func() bool {
			held = e.h.Holds(e.tb, name)
			return len(held) == 0
		}, "nothing is left of a channel that was idle for %v (the server holds %q)", e.h.Short.Gone, &held)
	}
}

func cleanupEternal(e *env) {
	e.need(e.h.Eternal != nil, "Eternal")
	a, b := e.backend(), e.backend()
	hs := e.attach(e.name("eternal"), a, b)
	e.publishMany(hs[0], "m", 5)
	once := e.attach(e.name("closed"), a)[0]
	if err := once.Close(); err != nil {
		e.fatalf("Close: %v", err)
	}
	never := e.handle(a, e.name("empty"))
	if err := never.Close(); err != nil {
		e.fatalf("Close: %v", err)
	}
	if eternal := e.h.Eternal(e.tb); len(eternal) > 0 {
		e.fatalf("these would never expire: %q", eternal)
	}
	for _, h := range hs {
		if err := h.Detach(); err != nil {
			e.fatalf("Detach: %v", err)
		}
	}
	if eternal := e.h.Eternal(e.tb); len(eternal) > 0 {
		e.fatalf("these would never expire, after all handles are detached: %q", eternal)
	}
}
