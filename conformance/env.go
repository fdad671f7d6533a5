package conformance

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dchannel/dchannel"
)

// result is what became of a case.
type result struct {
	guarantee, name string
	failures        []string
	notCovered      string
	logs            []string
	took            time.Duration
}

// env is one run of one case: what it uses, and what it found.
type env struct {
	h      Harness
	tb     testing.TB // for hooks
	ctx    context.Context
	cancel context.CancelFunc
	labels context.Context // carries the case's goroutine label
	id     string          // that label's value, and part of the case's channel names

	wg sync.WaitGroup // of the case's own goroutines

	mu     sync.Mutex
	res    result
	undo   []func() // run in reverse order at the end
	ending bool
}

// label marks the goroutines that a case has started, directly or not.
const label = "dchannel-conformance"

var runs atomic.Uint64

// started makes channel names of different runs of a program different, too.
var started = fmt.Sprintf("%x", time.Now().UnixNano())

// runCase runs c under its watchdog. It returns even if the case hangs or panics.
func runCase(tb testing.TB, h Harness, g guarantee, c testCase) result {
	e := &env{h: h, id: fmt.Sprintf("%s-%d", started, runs.Add(1))}
	e.res.guarantee, e.res.name = g.name, c.name
	e.tb = hookTB{tb, e}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	defer e.cancel()
	e.labels = pprof.WithLabels(e.ctx, pprof.Labels(label, e.id))

	began := time.Now()
	e.watched(h.Timeout, "the case", func() {
		e.body(func() { c.run(e) })
		e.mu.Lock()
		failed := len(e.res.failures) > 0
		e.mu.Unlock()
		if failed {
			e.cancel()
		}
		e.wg.Wait()
	})
	e.cancel()
	e.mu.Lock()
	undo := e.undo
	e.undo, e.ending = nil, true
	e.mu.Unlock()
	e.watched(h.Patience+5*time.Second, "the clean-up", func() {
		for i := len(undo) - 1; i >= 0; i-- {
			e.body(undo[i])
		}
	})
	e.mu.Lock()
	defer e.mu.Unlock()
	e.res.took = time.Since(began)
	return e.res
}

// watched runs f on a goroutine of its own, and gives it up after limit.
func (e *env) watched(limit time.Duration, what string, f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
		return
	case <-timer.C:
	}
	e.note(fmt.Sprintf("%s did not end within %v; all goroutines:\n%s", what, limit, stacks()))
	e.cancel()
	grace := time.NewTimer(3 * time.Second)
	defer grace.Stop()
	select {
	case <-done:
	case <-grace.C: // it stays behind
	}
}

func stacks() []byte {
	for size := 1 << 20; ; size *= 2 {
		buf := make([]byte, size)
		if n := runtime.Stack(buf, true); n < size || size >= 64<<20 {
			return buf[:n]
		}
	}
}

// body runs f so that neither a panic nor Goexit in it does more than end it.
func (e *env) body(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		pprof.SetGoroutineLabels(e.labels)
		defer func() {
			if p := recover(); p != nil {
				e.note(fmt.Sprintf("panic: %v\n%s", p, debug.Stack()))
				e.cancel()
			}
		}()
		f()
	}()
	<-done
}

// start runs f on a goroutine that the case waits for at its end.
func (e *env) start(f func()) { e.wg.Go(func() { e.body(f) }) }

// all runs all of fs at once and waits for them. If one of them failed, so has the
// caller.
func (e *env) all(fs ...func()) {
	var wg sync.WaitGroup
	for _, f := range fs {
		wg.Go(func() { e.body(f) })
	}
	wg.Wait()
	e.check()
}

// check ends the goroutine if the case has failed elsewhere.
func (e *env) check() {
	e.mu.Lock()
	failed := len(e.res.failures) > 0
	e.mu.Unlock()
	if failed {
		runtime.Goexit()
	}
}

// fatalf fails the case, and ends the goroutine and everything in the case that
// waits.
func (e *env) fatalf(format string, args ...any) {
	e.note(fmt.Sprintf(format, args...))
	e.cancel()
	runtime.Goexit()
}

// note records a failure, with the line of the case that found it. Only the first
// counts once the case is being taken down: the others follow from it.
func (e *env) note(problem string) {
	line := caseLine()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ctx.Err() != nil && len(e.res.failures) > 0 {
		return
	}
	e.res.failures = append(e.res.failures, e.res.guarantee+"/"+e.res.name+": "+problem+line)
}

// caseLine is the innermost line outside of the suite's machinery.
func caseLine() string {
	var pcs [64]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs[:])])
	for {
		f, more := frames.Next()
		base := filepath.Base(f.File)
		if strings.Contains(f.Function, "/conformance") && base != "env.go" && base != "run.go" && base != "expect.go" {
			return fmt.Sprintf("\n\tat %s:%d", base, f.Line)
		}
		if !more {
			return ""
		}
	}
}

func (e *env) logf(format string, args ...any) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.res.logs = append(e.res.logs, fmt.Sprintf(format, args...))
}

// need ends the case as not covered if the harness lacks something.
func (e *env) need(has bool, lacks string) {
	if has {
		return
	}
	e.mu.Lock()
	e.res.notCovered = "the harness has no " + lacks
	e.mu.Unlock()
	runtime.Goexit()
}

// cleanup has f run at the end of the case.
func (e *env) cleanup(f func()) {
	e.mu.Lock()
	ending := e.ending
	if !ending {
		e.undo = append(e.undo, f)
	}
	e.mu.Unlock()
	if ending {
		f()
	}
}

// hookTB is the t of the harness's functions: it works on any goroutine.
type hookTB struct {
	testing.TB
	e *env
}

func (t hookTB) Cleanup(f func())         { t.e.cleanup(f) }
func (t hookTB) Context() context.Context { return t.e.ctx }
func (t hookTB) Error(args ...any)        { t.e.note("harness: " + fmt.Sprintln(args...)) }
func (t hookTB) Errorf(format string, args ...any) {
	t.e.note("harness: " + fmt.Sprintf(format, args...))
}
func (t hookTB) Fail()                             { t.e.note("the harness failed") }
func (t hookTB) FailNow()                          { t.e.fatalf("the harness failed") }
func (t hookTB) Fatal(args ...any)                 { t.e.fatalf("harness: %s", fmt.Sprintln(args...)) }
func (t hookTB) Fatalf(format string, args ...any) { t.e.fatalf("harness: "+format, args...) }
func (t hookTB) Log(args ...any)                   { t.e.logf("%s", fmt.Sprintln(args...)) }
func (t hookTB) Logf(format string, args ...any)   { t.e.logf(format, args...) }
func (t hookTB) Skip(args ...any)                  { t.e.need(false, fmt.Sprintln(args...)) }
func (t hookTB) SkipNow()                          { t.e.need(false, "way to run this: it skipped") }
func (t hookTB) Skipf(format string, args ...any)  { t.e.need(false, fmt.Sprintf(format, args...)) }
func (t hookTB) Failed() bool {
	t.e.mu.Lock()
	defer t.e.mu.Unlock()
	return len(t.e.res.failures) > 0
}

// name returns a channel name that nothing else uses.
func (e *env) name(what string) string { return what + "-" + e.id }

// backend returns one more process's backend.
func (e *env) backend() dchannel.Backend { return e.owned(e.h.New(e.tb)) }

// short is backend, for one that forgets soon.
func (e *env) short() dchannel.Backend {
	e.need(e.h.Short != nil, "Short")
	return e.owned(e.h.Short.New(e.tb))
}

// few is backend, for one that retains few messages.
func (e *env) few() dchannel.Backend {
	e.need(e.h.Short != nil, "Short")
	return e.owned(e.h.Short.Few(e.tb))
}

func (e *env) owned(b dchannel.Backend) dchannel.Backend {
	pprof.SetGoroutineLabels(e.labels) // a harness may take them off
	if b == nil {
		e.fatalf("the harness returned a nil backend")
	}
	e.cleanup(func() {
		if err := b.Close(); err != nil {
			e.note(fmt.Sprintf("Backend.Close: %v", err))
		}
	})
	return b
}

// handle returns a handle that is not attached yet.
func (e *env) handle(b dchannel.Backend, name string, opts ...dchannel.Option) Handle {
	return e.wrapped(dchannel.New(name, b, opts...), b)
}

func (e *env) wrapped(ch *dchannel.Channel, b dchannel.Backend) Handle {
	h := e.h.Wrap(ch, b)
	e.cleanup(func() { _ = h.Detach() }) // its error is about messages that a failed case left behind
	return h
}

// open returns an attached handle.
func (e *env) open(b dchannel.Backend, name string, opts ...dchannel.Option) Handle {
	ctx, done := e.patient()
	defer done()
	ch, err := dchannel.Open(ctx, name, b, append([]dchannel.Option{dchannel.WithTimeout(e.h.Patience)}, opts...)...)
	if err != nil {
		e.fatalf("Open %q: %v", name, err)
	}
	return e.wrapped(ch, b)
}

// attach opens a handle on name for each backend, and returns when all have
// received a message: from then on it does not matter to the case whether Open
// returned too early, which is ReadyOnReturn's business.
func (e *env) attach(name string, backends ...dchannel.Backend) []Handle {
	hs := make([]Handle, len(backends))
	for i, b := range backends {
		hs[i] = e.open(b, name)
	}
	e.greet(hs...)
	return hs
}

// greet publishes until all of hs, handles of one channel, have received the same
// message, and nothing is left behind it.
func (e *env) greet(hs ...Handle) {
	end := time.Now().Add(e.h.Patience)
	for i := 0; ; i++ {
		hello := fmt.Sprintf("hello %d on %s", i, hs[0].Name())
		e.publish(hs[0], hello)
		missing := -1
		for j, h := range hs {
			if !e.readTo(h, hello) {
				missing = j
				break
			}
		}
		if missing < 0 {
			return
		}
		if time.Now().After(end) {
			e.fatalf("listener %d of %d on %q gets nothing, after %d messages in %v",
				missing+1, len(hs), hs[0].Name(), i+1, e.h.Patience)
		}
	}
}

// readTo reads up to hello, over earlier ones.
func (e *env) readTo(h Handle, hello string) bool {
	ctx, done := context.WithTimeout(e.ctx, min(250*time.Millisecond, e.h.Patience/4))
	defer done()
	for {
		v, err := h.Listen(ctx)
		switch {
		case err != nil && ctx.Err() != nil && e.ctx.Err() == nil:
			return false
		case err != nil:
			e.fatalf("Listen on %q: %v", h.Name(), err)
		case v == hello:
			return true
		}
		var n int
		var name string
		if _, err := fmt.Sscanf(fmt.Sprint(v), "hello %d on ", &n); err == nil {
			_, name, _ = strings.Cut(v.(string), " on ")
		}
		if name != h.Name() {
			e.fatalf("a listener on %q got %q, which was not published there", h.Name(), v)
		}
	}
}

// patient returns a context for what must happen.
func (e *env) patient() (context.Context, context.CancelFunc) {
	return context.WithTimeout(e.ctx, e.h.Patience)
}

// eventually waits until cond holds.
func (e *env) eventually(cond func() bool, what string, args ...any) {
	end := time.Now().Add(e.h.Patience)
	for wait := time.Millisecond; !cond(); wait = min(2*wait, 50*time.Millisecond) {
		if time.Now().After(end) || e.ctx.Err() != nil {
			e.fatalf("not within %v: %s", e.h.Patience, fmt.Sprintf(what, args...))
		}
		e.sleep(wait)
	}
}

// sleep waits for time itself to pass.
func (e *env) sleep(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-e.ctx.Done():
		e.check()
	}
}

// once returns f as a function that runs once, and at the end of the case at the
// latest: for what ends a fault.
func (e *env) once(f func()) func() {
	f = sync.OnceFunc(f)
	e.cleanup(f)
	return f
}

func errIs(err error, targets ...error) bool {
	for _, target := range targets {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}
