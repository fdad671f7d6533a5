package conformance

import (
	"bytes"
	"fmt"
	"reflect"
	"runtime/pprof"
	"strconv"
	"strings"
	"time"

	"github.com/dchannel/dchannel"
)

var cost = []guarantee{
	{
		name: "OneUpstream",
		rule: "N handles of one channel in one process: one upstream subscription; " +
			"many channels: at most two connections per backend and no goroutine per channel at rest",
		cases: []testCase{
			{"Handles", oneUpstream},
			{"Channels", fewConnections},
			{"Churn", churn},
		},
	},
	{
		name:  "IdleCost",
		rule:  "a quiet channel sends nothing; a quiet backend sends one small probe every few seconds",
		cases: []testCase{{"Quiet", idleCost}},
		alone: true,
	},
	{
		name: "NoLeak",
		rule: "after Detach, Close and Backend.Close, goroutines and server-side subscriptions are where they were; " +
			"what was made on a client is always removed",
		cases: []testCase{
			{"Subscriptions", noSubscriptionLeft},
			{"Goroutines", noGoroutineLeft},
		},
	},
}

func oneUpstream(e *env) {
	e.need(e.h.Upstreams != nil, "Upstreams")
	b := e.backend()
	name := e.name("upstream")
	var hs []Handle
	for range 20 {
		hs = append(hs, e.open(b, name))
	}
	e.greet(hs...)
	if n := e.h.Upstreams(e.tb, name); n != 1 {
		e.fatalf("%d handles of one process make %d subscriptions on the server, want 1", len(hs), n)
	}
	for _, h := range hs[1:] {
		if err := h.Detach(); err != nil {
			e.fatalf("Detach: %v", err)
		}
	}
	e.publish(hs[0], "still there")
	e.expect(hs[0], "still there")
	if n := e.h.Upstreams(e.tb, name); n != 1 {
		e.fatalf("one handle is left, and %d subscriptions on the server, want 1", n)
	}
}

func fewConnections(e *env) {
	b := e.backend()
	e.attach(e.name("first"), b)
	e.rest()
	before := len(e.goroutines())
	const n = 300
	for i := range n {
		e.open(b, e.name(fmt.Sprint("c", i)))
	}
	if e.h.Connections != nil {
		if c := e.h.Connections(e.tb, b); c > n/10 {
			e.fatalf("%d channels use %d connections", n, c)
		}
	}
	e.rest()
	if more := len(e.goroutines()) - before; more > n/10 {
		e.fatalf("%d channels at rest have %d goroutines; for example\n%s", n, more, e.goroutines()[before])
	}
}

// churn opens and leaves one channel again and again, from several goroutines, and so
// subscribes while the end of the subscription before is under way.
func churn(e *env) {
	b := e.backend()
	name, closed := e.name("churn"), e.name("closed")
	if err := e.handle(b, closed).Close(); err != nil {
		e.fatalf("Close: %v", err)
	}
	var turns []func()
	for range 4 {
		turns = append(turns, func() {
			for range 25 {
				for _, name := range []string{name, closed} {
					h := e.open(b, name)
					if err := h.Detach(); err != nil {
						e.fatalf("Detach: %v", err)
					}
				}
			}
		})
	}
	e.all(turns...)
	h := e.attach(name, b)[0]
	e.publish(h, "still there")
	e.expect(h, "still there")
}

// rest waits until the number of the case's goroutines does not change any more, as
// far as one can see.
func (e *env) rest() {
	last, same := -1, 0
	for range 100 {
		n := len(e.goroutines())
		if n == last {
			same++
		} else {
			last, same = n, 0
		}
		if same == 3 {
			return
		}
		e.sleep(5 * time.Millisecond)
	}
}

func idleCost(e *env) {
	e.need(e.h.Calls != nil, "Calls")
	b := e.backend()
	const channels, window = 100, time.Second
	var hs []Handle
	for i := range channels {
		h := e.open(b, e.name(fmt.Sprint("idle", i)))
		e.start(func() {
			if v, err := h.Listen(e.ctx); err == nil {
				e.fatalf("a quiet channel got %s", brief(v))
			}
		})
		hs = append(hs, h)
	}
	// Wait until what the beginning costs is over.
	calls := e.h.Calls(e.tb)
	quiet := 0
	allowed := 0
	if e.h.ProbeEvery > 0 {
		allowed = 2 * (int(window/e.h.ProbeEvery) + 2) // a question and its way back
	}
	e.eventually(func() bool {
		now := e.h.Calls(e.tb)
		if now-calls <= allowed {
			quiet++
		} else {
			quiet = 0
		}
		calls = now
		return quiet >= 8
	}, "%d quiet channels stop asking the server", channels)
	e.sleep(window)
	if n := e.h.Calls(e.tb) - calls; n > allowed {
		e.fatalf("%d quiet channels sent %d operations to the server in %v, want at most %d", channels, n, window, allowed)
	}
	for _, h := range hs {
		if err := h.Detach(); err != nil {
			e.fatalf("Detach: %v", err)
		}
	}
	e.cancel()
}

func noSubscriptionLeft(e *env) {
	e.need(e.h.Upstreams != nil, "Upstreams")
	a, b := e.backend(), e.backend()
	gone := func(name, after string) {
		e.eventually(func() bool { return e.h.Upstreams(e.tb, name) == 0 }, "the server-side subscription is gone after %s", after)
	}
	detached, closed, abandoned := e.name("detached"), e.name("closed"), e.name("abandoned")
	hs := e.attach(detached, a, a, b)
	for _, h := range hs {
		if err := h.Detach(); err != nil {
			e.fatalf("Detach: %v", err)
		}
		if err := h.Detach(); err != nil {
			e.fatalf("Detach again: %v", err)
		}
		_, err := h.Listen(e.ctx)
		e.expectErr("Listen after Detach", err, dchannel.ErrDetached)
		e.expectErr("Publish after Detach", h.Publish(e.ctx, "x"), dchannel.ErrDetached)
	}
	gone(detached, "Detach")
	back := e.attach(detached, a)[0] // the channel is open, and can be joined again
	e.publish(back, "again")
	e.expect(back, "again")

	hs = e.attach(closed, a, b)
	if err := hs[0].Close(); err != nil {
		e.fatalf("Close: %v", err)
	}
	e.expectClosed(hs[0])
	e.expectClosed(hs[1])
	gone(closed, "Close")

	last := e.backend()
	h := e.attach(abandoned, last)[0]
	if err := last.Close(); err != nil {
		e.fatalf("Backend.Close: %v", err)
	}
	gone(abandoned, "Backend.Close")
	_, err := h.Listen(e.ctx)
	e.expectErr("Listen after Backend.Close", err, dchannel.ErrBackendClosed)
}

func noGoroutineLeft(e *env) {
	b := e.backend()
	round := func(i int) {
		name := e.name(fmt.Sprint("g", i))
		hs := e.attach(name, b, b)
		e.publish(hs[0], "x")
		e.expect(hs[1], "x")
		if i%2 == 0 {
			if err := hs[0].Close(); err != nil {
				e.fatalf("Close: %v", err)
			}
			e.expectGreeted(hs[0], "x")
			e.expectClosed(hs[0])
			e.expectClosed(hs[1])
		}
		for _, h := range hs {
			if err := h.Detach(); err != nil {
				e.fatalf("Detach: %v", err)
			}
		}
	}
	const rounds = 10
	for i := range 2 {
		round(i)
	}
	e.rest()
	before := e.goroutines()
	for i := range rounds {
		round(2 + i)
	}
	e.eventually(func() bool { return len(e.goroutines()) < len(before)+rounds/2 },
		"%d channels that were used and left keep goroutines: first %d, now %v", rounds, len(before), lazily(func() any { return len(e.goroutines()) }))
	if err := b.Close(); err != nil {
		e.fatalf("Backend.Close: %v", err)
	}
	if err := b.Close(); err != nil {
		e.fatalf("a second Backend.Close: %v", err)
	}
	own := reflect.TypeOf(b)
	if own.Kind() == reflect.Pointer {
		own = own.Elem()
	}
	left := func() string {
		for _, g := range e.goroutines() {
			if strings.Contains(g, own.PkgPath()+".") || strings.Contains(g, "github.com/dchannel/dchannel.") {
				return g
			}
		}
		return ""
	}
	e.eventually(func() bool { return left() == "" }, "no goroutine of the backend is left after its Close: %s", lazily(func() any { return left() }))
}

// lazily prints what f returns when it is printed.
type lazily func() any

func (f lazily) String() string { return fmt.Sprint(f()) }

// goroutines returns the stacks of the goroutines that the case has started, directly
// or not, and that are not its own: those that carry its label. So other cases, which
// run at the same time, do not count.
func (e *env) goroutines() (stacks []string) {
	var buf bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&buf, 1); err != nil {
		e.fatalf("goroutine profile: %v", err)
	}
	for _, group := range strings.Split(buf.String(), "\n\n") {
		if !strings.Contains(group, strconv.Quote(label)+":"+strconv.Quote(e.id)) ||
			strings.Contains(group, "conformance.(*env).body") {
			continue
		}
		lines := strings.Split(group, "\n")
		n, _, _ := strings.Cut(lines[0], " ")
		if strings.HasPrefix(lines[0], "goroutine profile:") {
			n, _, _ = strings.Cut(lines[1], " ")
		}
		count, _ := strconv.Atoi(n)
		for range count {
			stacks = append(stacks, group)
		}
	}
	return stacks
}
