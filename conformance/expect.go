package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/dchannel/dchannel"
)

// publish publishes v, which must succeed.
func (e *env) publish(h Handle, v any) {
	ctx, done := e.patient()
	defer done()
	if err := h.Publish(ctx, v); err != nil {
		e.fatalf("Publish %s: %v", brief(v), err)
	}
}

// publishMany publishes n messages, numbered under prefix, one after another, and
// returns them.
func (e *env) publishMany(h Handle, prefix string, n int) []any {
	vs := make([]any, n)
	for i := range vs {
		vs[i] = fmt.Sprintf("%s %d", prefix, i)
		e.publish(h, vs[i])
	}
	return vs
}

// expect reads one message from h for each of want, which must be equal.
func (e *env) expect(h Handle, want ...any) {
	for i, w := range want {
		ctx, done := e.patient()
		v, err := h.Listen(ctx)
		done()
		if err != nil {
			e.fatalf("message %d of %d, %s: Listen: %s", i+1, len(want), brief(w), e.why(err))
		}
		if !equal(v, w) {
			e.fatalf("message %d of %d: got %s, want %s", i+1, len(want), brief(v), brief(w))
		}
	}
}

// expectGreeted is expect of one message, over the greetings of attach before it.
func (e *env) expectGreeted(h Handle, want any) {
	for {
		ctx, done := e.patient()
		v, err := h.Listen(ctx)
		done()
		if err != nil {
			e.fatalf("waiting for %s: %s", brief(want), e.why(err))
		}
		if s, ok := v.(string); ok && strings.HasPrefix(s, "hello ") {
			continue
		}
		if !equal(v, want) {
			e.fatalf("got %s, want %s", brief(v), brief(want))
		}
		return
	}
}

// why explains an error of a call with a patient context.
func (e *env) why(err error) string {
	if err == context.DeadlineExceeded { //nolint:errorlint // Listen promises this very value
		return fmt.Sprintf("nothing within %v", e.h.Patience)
	}
	return err.Error()
}

func equal(got, want any) bool {
	if b, ok := want.([]byte); ok {
		g, ok := got.([]byte)
		return ok && bytes.Equal(g, b)
	}
	return reflect.DeepEqual(got, want)
}

// brief prints a value, or the ends of a long one.
func brief(v any) string {
	s := fmt.Sprintf("%q", v)
	switch v.(type) {
	case string, []byte:
	default:
		s = fmt.Sprintf("%#v", v)
	}
	if len(s) > 100 {
		s = s[:60] + "…" + s[len(s)-20:]
	}
	switch v := v.(type) {
	case string:
		return fmt.Sprintf("string of %d bytes %s", len(v), s)
	case []byte:
		return fmt.Sprintf("[]byte of %d bytes %s", len(v), s)
	}
	return s
}

// expectClosed reads one ErrChanClosed from h.
func (e *env) expectClosed(h Handle) {
	ctx, done := e.patient()
	defer done()
	if v, err := h.Listen(ctx); err == nil {
		e.fatalf("got %s after everything was read, want ErrChanClosed", brief(v))
	} else if !errors.Is(err, dchannel.ErrChanClosed) {
		e.fatalf("Listen after the close: %s, want ErrChanClosed", e.why(err))
	}
}

// expectLost reads one LostError from h.
func (e *env) expectLost(h Handle) *dchannel.LostError {
	ctx, done := e.patient()
	defer done()
	v, err := h.Listen(ctx)
	var lost *dchannel.LostError
	switch {
	case err == nil:
		e.fatalf("got %s where messages were lost, want a LostError", brief(v))
	case !errors.As(err, &lost) || !errors.Is(err, dchannel.ErrLost):
		e.fatalf("Listen where messages were lost: %s, want a LostError", e.why(err))
	}
	return lost
}

// nothingElse shows, by a sentinel that by publishes on the channel of hs, that
// nothing was left to read.
func (e *env) nothingElse(by Handle, hs ...Handle) {
	sentinel := "nothing else on " + by.Name()
	e.publish(by, sentinel)
	for _, h := range hs {
		e.expect(h, sentinel)
	}
	e.silent(hs...)
}

// silent looks for messages that were not to come, when sentinels have shown that they
// would have come by now.
func (e *env) silent(hs ...Handle) {
	e.sleep(settle)
	for _, h := range hs {
		ctx, done := context.WithTimeout(e.ctx, time.Millisecond)
		v, err := h.Listen(ctx)
		done()
		if err == nil {
			e.fatalf("got %s on %q behind everything that was published", brief(v), h.Name())
		} else if err != context.DeadlineExceeded { //nolint:errorlint // this very value is promised
			e.fatalf("Listen with nothing to read: %v, want context.DeadlineExceeded itself", err)
		}
	}
}

// expectErr checks that err is one of want, and none of the sentinels that tell
// something else.
func (e *env) expectErr(what string, err error, want ...error) {
	if err == nil {
		e.fatalf("%s: no error, want %s", what, oneOf(want))
	}
	if !errIs(err, want...) {
		e.fatalf("%s: %v; want %s", what, err, oneOf(want))
	}
}

func oneOf(errs []error) string {
	texts := make([]string, len(errs))
	for i, err := range errs {
		texts[i] = fmt.Sprintf("%q", err)
	}
	return strings.Join(texts, " or ")
}

// prompt runs call with a context that ends while it is blocked, and checks that it
// returns soon afterwards. A busy machine may be late, so the best of some tries
// counts; cancelled says how the context ends.
func (e *env) prompt(what string, call func(ctx context.Context) error, check func(err, ctxErr error) string) {
	best := time.Duration(1<<63 - 1)
	for i := 0; i < 20 && best > promptly; i++ {
		ctx, cancel := context.WithTimeout(e.ctx, 15*time.Millisecond)
		if i%2 == 0 { // by hand this time
			cancel()
			ctx, cancel = context.WithCancel(e.ctx)
			time.AfterFunc(15*time.Millisecond, cancel)
		}
		returned := make(chan struct{})
		late := make(chan time.Duration, 1)
		go func() {
			<-ctx.Done()
			ended := time.Now()
			<-returned
			late <- time.Since(ended)
		}()
		err := call(ctx)
		early := ctx.Err() == nil
		close(returned)
		if early {
			cancel()
			e.fatalf("%s returned before its context ended: %v", what, err)
		}
		best = min(best, <-late)
		if problem := check(err, ctx.Err()); problem != "" {
			cancel()
			e.fatalf("%s: %s", what, problem)
		}
		cancel()
	}
	if best > promptly {
		e.fatalf("%s returned %v after its context's end, at best; want at most %v", what, best.Round(time.Millisecond), promptly)
	}
}
