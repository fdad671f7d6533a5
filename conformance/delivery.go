package conformance

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/dchannel/dchannel"
)

var delivery = []guarantee{
	{
		name: "RoundTrip",
		rule: "what was published arrives unchanged: a string as a string, a []byte as a []byte, anything else as what the codec makes of it",
		cases: []testCase{
			{"Kinds", roundTripKinds},
			{"Sizes", roundTripSizes},
			{"Many", roundTripMany},
		},
	},
	{
		name:  "BinarySafe",
		rule:  "what was published arrives unchanged, empty and non-UTF-8 payloads too",
		cases: []testCase{{"Bytes", binarySafe}},
	},
	{
		name: "ReadyOnReturn",
		rule: "when Open has returned, everything published afterwards, by anyone, reaches this handle",
		cases: []testCase{
			{"Here", func(e *env) { readyOnReturn(e, false) }},
			{"There", func(e *env) { readyOnReturn(e, true) }},
		},
	},
	{
		name:  "FanOut",
		rule:  "every attached handle, in every process, gets every message",
		cases: []testCase{{"Processes", fanOut}},
	},
	{
		name:  "Isolation",
		rule:  "a message reaches no other channel, whatever the names",
		cases: []testCase{{"Names", isolation}},
	},
	{
		name:  "Order",
		rule:  "one total order per channel, the same for every listener, respecting each publisher's own order",
		cases: []testCase{{"Publishers", order}},
	},
	{
		name: "ExactlyOnce",
		rule: "from the backend's acceptance to the listener, no message twice, over cuts, restarts and replays too",
		cases: []testCase{
			{"LostReply", lostReply},
			{"Positions", resumeAtPosition},
		},
	},
	{
		name: "NoSilentLoss",
		rule: "consecutive deliveries are consecutive in the order, or Listen returns, at the very place of the gap, " +
			"a LostError that says how many, and then goes on",
		cases: []testCase{
			{"Retention", lossBeyondRetention},
			{"Position", lossBeforePosition},
		},
	},
	{
		name: "Accepted",
		rule: "Publish returns nil only when the backend has taken the message into the order; " +
			"an error tells surely not sent from unknown (ErrUncertain)",
		cases: []testCase{{"Down", publishWhileDown}},
	},
	{
		name: "SizeLimit",
		rule: "too large is ErrTooLarge before anything is sent; the limit is the same documented default on all backends and can be set",
		cases: []testCase{
			{"Default", sizeDefault},
			{"Set", sizeSet},
		},
	},
	{
		name:  "PayloadOwnership",
		rule:  "the caller may reuse its slice when Publish returned; no listener sees another's writes",
		cases: []testCase{{"Slices", payloadOwnership}},
	},
	{
		name: "SlowListener",
		rule: "a handle that does not read neither blocks publishers nor other handles, and its memory is bounded; " +
			"when it reads again it catches up from retention",
		cases: []testCase{{"CatchesUp", slowListener}},
	},
	{
		name: "CancelBlocked",
		rule: "any blocked call returns within 100 ms of its context's end; Listen returns the context's own error",
		cases: []testCase{
			{"Listen", cancelListen},
			{"Down", cancelWhileDown},
		},
	},
}

func roundTripKinds(e *env) {
	type order struct {
		ID   int      `json:"id"`
		Tags []string `json:"tags"`
	}
	hs := e.attach(e.name("kinds"), e.backend(), e.backend())
	values := []struct{ in, out any }{
		{"text", "text"},
		{"", ""},
		{"日本語 \u2028 \U0001F600 <>&\"'\\%s\r\n\t", "日本語 \u2028 \U0001F600 <>&\"'\\%s\r\n\t"},
		{"0", "0"}, // and not a number
		{"null", "null"},
		{[]byte("bytes"), []byte("bytes")},
		{[]byte{}, []byte{}},
		{[]byte(nil), []byte{}},
		{42, float64(42)},
		{true, true},
		{nil, nil},
		{[]string{"a", "b"}, []any{"a", "b"}},
		{map[string]any{"k": nil}, map[string]any{"k": nil}},
		{order{7, []string{"x"}}, map[string]any{"id": float64(7), "tags": []any{"x"}}},
	}
	for _, v := range values {
		e.publish(hs[0], v.in)
	}
	for _, h := range hs {
		for _, v := range values {
			e.expect(h, v.out)
		}
	}
	e.publish(hs[0], order{8, nil})
	ctx, done := e.patient()
	defer done()
	for _, h := range hs {
		m, err := h.Next(ctx)
		if err != nil {
			e.fatalf("Next: %s", e.why(err))
		}
		var o order
		if err := m.Decode(&o); err != nil || o.ID != 8 {
			e.fatalf("Decode: %+v, %v; want the order 8", o, err)
		}
		if since := time.Since(m.Time); since < -time.Hour || since > time.Hour || m.Position.Seq == 0 {
			e.fatalf("the message has time %v and position %v", m.Time, m.Position)
		}
	}
	e.nothingElse(hs[0], hs...)
}

func roundTripSizes(e *env) {
	hs := e.attach(e.name("sizes"), e.backend(), e.backend())
	for _, n := range []int{
		1, 127, 128, 255, 256, 1023, 4095, 4096, 4097, 16_384, 65_535, 65_536, 131_072, 500_000,
		dchannel.DefaultMaxMessage,
	} {
		s := strings.Repeat("0123456789abcde\n", n/16+1)[:n]
		e.publish(hs[0], s)
		for _, h := range hs {
			e.expect(h, s)
		}
	}
}

func roundTripMany(e *env) {
	hs := e.attach(e.name("many"), e.backend(), e.backend())
	const n = 500
	ctx, done := e.patient()
	defer done()
	want := make([]any, n)
	for i := range want {
		want[i] = fmt.Sprintf("message %d", i)
		if err := hs[0].PublishAsync(ctx, want[i]); err != nil {
			e.fatalf("PublishAsync: %v", err)
		}
	}
	if err := hs[0].Flush(ctx); err != nil {
		e.fatalf("Flush: %v", err)
	}
	for _, h := range hs {
		e.expect(h, want...)
	}
	e.nothingElse(hs[0], hs...)
}

func binarySafe(e *env) {
	hs := e.attach(e.name("binary"), e.backend(), e.backend())
	all := make([]byte, 0, 512)
	for i := range 512 {
		all = append(all, byte(i))
	}
	payloads := []string{
		"", "\x00", "\xff", "\x00\x00", string(all), "\r\n", "a\x00b", "\xc3\x28", "\xed\xa0\x80", "\xf5\x80",
		"\x1f\x8b\x08", "\r\n$-1\r\n", "+OK\r\n", "\x80\x04", strings.Repeat("\xfe", 1000),
	}
	for _, p := range payloads {
		e.publish(hs[0], p)
		e.publish(hs[0], []byte(p))
	}
	for _, h := range hs {
		for _, p := range payloads {
			e.expect(h, p, []byte(p))
		}
	}
	e.nothingElse(hs[0], hs...)
}

func readyOnReturn(e *env, there bool) {
	here := e.backend()
	from := here
	if there {
		from = e.backend()
	}
	for i := range 25 {
		name := e.name(fmt.Sprint("ready", i))
		p := e.handle(from, name)
		if i%2 == 0 { // the publisher knows the channel, or it does not
			e.publish(p, "early")
		}
		h := e.open(here, name)
		e.publish(p, "now") // and nothing after it that could show what is missing
		e.expect(h, "now")
	}
}

func fanOut(e *env) {
	a, b, c, d := e.backend(), e.backend(), e.backend(), e.backend()
	hs := e.attach(e.name("fan"), a, b, c, d, a, b, c, d, a)
	want := e.publishMany(hs[0], "to all", 20)
	for _, h := range hs {
		e.expect(h, want...)
	}
	e.nothingElse(hs[0], hs...)
}

func isolation(e *env) {
	here, there := e.backend(), e.backend()
	base := e.name("i")
	names := []string{base, "*", ">", "$", "-", "..", "/", "{}", "%"}
	for _, tail := range []string{
		".b", " b", "b", "_b", "-b", "/b", ":b", "%2Eb", "%20b", "+b", "=b", ",b", ";b", "\\b", "|b", "?b", "#b", "@b", "~b",
		".B", "B", ".", " ", "*", "?", ">", ".*", ".>", ".b.c", "[ab]", "{x}", "x", "{x}y", "{", "}", "}{", "\"", "'", "$", "^",
		"日本語", "日本", "é", "e\u0301", "\u200b", "\ufffd",
	} {
		names = append(names, base+tail)
	}
	long := base + strings.Repeat("n", dchannel.MaxNameLen-len(base)-1)
	names = append(names, long, long+"n", long+"m", " "+base, "."+base, "{"+base+"}")

	listeners := make([]Handle, len(names))
	publishers := make([]Handle, len(names))
	for i, name := range names {
		listeners[i] = e.open(here, name)
		publishers[i] = e.handle(there, name)
	}
	for _, l := range listeners {
		if len(l.Name()) > 2 { // others may use the short ones
			e.greet(l)
		}
	}
	for round := range 2 {
		for i, name := range names {
			e.publish(publishers[i], fmt.Sprintf("%d for %q of %s", round, name, e.id))
		}
	}
	for i, name := range names {
		for round := range 2 {
			want := fmt.Sprintf("%d for %q of %s", round, name, e.id)
			if len(name) > 2 {
				e.expect(listeners[i], want)
			} else {
				e.expectAmongOthers(listeners[i], want)
			}
		}
	}
	var own []Handle
	for i, name := range names {
		if len(name) > 2 {
			e.publish(publishers[i], "the end")
			e.expect(listeners[i], "the end")
			own = append(own, listeners[i])
		}
	}
	e.silent(own...)
}

// expectAmongOthers reads up to want, over messages of other programs that use the
// same name now. What belongs to this run is not skipped.
func (e *env) expectAmongOthers(h Handle, want string) {
	ctx, done := e.patient()
	defer done()
	for {
		v, err := h.Listen(ctx)
		if err != nil {
			e.fatalf("waiting for %q: %s", want, e.why(err))
		}
		if v == want {
			return
		}
		if s, ok := v.(string); !ok || strings.Contains(s, e.id) {
			e.fatalf("a listener on %q got %s", h.Name(), brief(v))
		}
	}
}

func order(e *env) {
	bs := []dchannel.Backend{e.backend(), e.backend(), e.backend()}
	name := e.name("order")
	var log history
	hs := e.attach(name, bs...)
	const rounds, each = 20, 5
	for round := range rounds {
		var turns []func()
		for p, h := range hs {
			turns = append(turns, func() {
				for i := range each {
					if err := e.record(&log, h, fmt.Sprint("p", p), round*each+i); err != nil {
						e.fatalf("Publish: %v", err)
					}
				}
			})
		}
		e.all(turns...)
	}
	for i, h := range hs {
		e.recordAll(&log, h, fmt.Sprint("l", i), rounds*each*len(hs))
	}
	e.judge(&log, checks{})
}

func lostReply(e *env) {
	e.need(e.h.LoseReply != nil, "LoseReply")
	a, b := e.backend(), e.backend()
	hs := e.attach(e.name("reply"), a, b)
	for i := range 3 {
		v := fmt.Sprint("with a lost reply ", i)
		e.h.LoseReply(e.tb, a, hs[0].Name())
		ctx, done := e.patient()
		err := hs[0].Publish(ctx, v)
		done()
		after := fmt.Sprint("after it ", i)
		switch {
		case err == nil:
		case errors.Is(err, dchannel.ErrUncertain):
			e.logf("a lost reply made Publish return %v", err)
		default:
			e.fatalf("Publish with a lost reply: %v, want nil or ErrUncertain", err)
		}
		e.publish(hs[0], after)
		for _, h := range hs {
			e.expect(h, v, after) // it took effect: once, and not later
		}
	}
	e.nothingElse(hs[0], hs...)
}

// resumeAtPosition restarts a listener at each message: nothing twice, nothing missing.
func resumeAtPosition(e *env) {
	b, p := e.backend(), e.backend()
	name := e.name("resume")
	h := e.attach(name, b, b)[0]
	pub := e.handle(p, name)
	const n = 40
	ctx, done := e.patient()
	defer done()
	for i := range n { // in frames, so that positions lie inside of them
		if err := pub.PublishAsync(ctx, fmt.Sprint("m", i)); err != nil {
			e.fatalf("PublishAsync: %v", err)
		}
	}
	if err := pub.Flush(ctx); err != nil {
		e.fatalf("Flush: %v", err)
	}
	for i := range n {
		ctx, done := e.patient()
		m, err := h.Next(ctx)
		done()
		if err != nil {
			e.fatalf("message %d: %s", i, e.why(err))
		}
		v, err := m.Value()
		if err != nil || v != fmt.Sprint("m", i) {
			e.fatalf("message %d: got %s, %v", i, brief(v), err)
		}
		if i%5 == 2 {
			if err := h.Detach(); err != nil {
				e.fatalf("Detach: %v", err)
			}
			h = e.open(b, name, dchannel.WithStart(dchannel.After(m.Position)))
		}
	}
	e.nothingElse(pub, h)
}

func lossBeyondRetention(e *env) {
	e.need(e.h.Cut != nil, "Cut")
	a, b := e.few(), e.few()
	hs := e.attach(e.name("beyond"), a, b)
	var log history
	send := func(from, n int) {
		for i := range n {
			if err := e.record(&log, hs[0], "p", from+i); err != nil {
				e.fatalf("Publish: %v", err)
			}
		}
	}
	send(0, 5)
	e.recordAll(&log, hs[1], "cut", 5)
	heal := e.once(e.h.Cut(e.tb, b))
	n := e.h.Short.Messages + e.h.Short.Dropped
	send(5, n)
	heal()
	e.recordTo(&log, hs[1], "cut", fmt.Sprint("p#", 5+n-1))
	send(5+n, 5)
	e.recordTo(&log, hs[1], "cut", fmt.Sprint("p#", 5+n+4))
	// A push that resumes from the store's own history may bring more than is retained:
	// then there is no loss to tell.
	e.judge(&log, checks{lossOK: true})
}

func lossBeforePosition(e *env) {
	a := e.few()
	h := e.attach(e.name("before"), a)[0]
	e.publish(h, "the last one that was read")
	ctx, done := e.patient()
	last, err := h.Next(ctx)
	done()
	if err != nil {
		e.fatalf("Next: %s", e.why(err))
	}
	n := e.h.Short.Messages + e.h.Short.Dropped
	e.publishMany(h, "m", n)
	late := e.open(e.few(), h.Name(), dchannel.WithStart(dchannel.After(last.Position)))
	lost := e.expectLost(late)
	if lost.After != last.Position || lost.Count == 0 || lost.Count > uint64(n) ||
		lost.Next != (dchannel.Position{Epoch: last.Position.Epoch, Seq: last.Position.Seq + lost.Count + 1}) {
		e.fatalf("LostError after %v: count %d, after %v, next %v", last.Position, lost.Count, lost.After, lost.Next)
	}
	for i := int(lost.Count); i < n; i++ {
		e.expect(late, fmt.Sprintf("m %d", i))
	}
	if kept := n - int(lost.Count); kept < e.h.Short.Messages {
		e.fatalf("%d messages were retained, want at least %d", kept, e.h.Short.Messages)
	}
}

func publishWhileDown(e *env) {
	e.need(e.h.Cut != nil, "Cut")
	a, b := e.backend(), e.backend()
	name := e.name("down")
	hs := e.attach(name, a, b)
	short := e.handle(a, name, dchannel.WithTimeout(200*time.Millisecond))
	heal := e.once(e.h.Cut(e.tb, a))
	var log history
	for i := range 2 {
		_ = e.record(&log, short, "cut off", i) // the record has the error
	}
	_ = e.recordCall(&log, "async", 0, func(ctx context.Context, v any) error {
		if err := short.PublishAsync(ctx, v); err != nil {
			return err
		}
		return short.Flush(ctx)
	})
	if n := log.accepted(); n > 0 {
		e.fatalf("%d of 3 publishes returned nil while the server could not be reached", n)
	}
	heal()
	for i, h := range hs {
		if err := e.record(&log, h, fmt.Sprint("healed", i), 0); err != nil {
			e.fatalf("Publish after the cut: %v", err)
		}
	}
	for i, h := range hs {
		e.recordAccepted(&log, h, fmt.Sprint("l", i))
	}
	e.judge(&log, checks{})
}

func sizeDefault(e *env) {
	hs := e.attach(e.name("size"), e.backend(), e.backend())
	for _, v := range []any{
		make([]byte, dchannel.DefaultMaxMessage+1),
		strings.Repeat("x", dchannel.DefaultMaxMessage+1),
		make([]byte, 64<<20),
		[]string{strings.Repeat("x", dchannel.DefaultMaxMessage)},
	} {
		e.expectErr("Publish of a message above the default limit", hs[0].Publish(e.ctx, v), dchannel.ErrTooLarge)
		e.expectErr("PublishAsync of a message above the default limit", hs[0].PublishAsync(e.ctx, v), dchannel.ErrTooLarge)
	}
	e.nothingElse(hs[0], hs...)
}

func sizeSet(e *env) {
	b := e.backend()
	h := e.attach(e.name("set"), b)[0]
	p := e.handle(b, h.Name(), dchannel.WithMaxMessage(100))
	e.publish(p, make([]byte, 100))
	e.expect(h, make([]byte, 100))
	for _, v := range []any{make([]byte, 101), strings.Repeat("x", 101), strings.Repeat("日", 34), make([]int, 100)} {
		e.expectErr("Publish above WithMaxMessage(100)", p.Publish(e.ctx, v), dchannel.ErrTooLarge)
	}
	e.nothingElse(p, h)
}

func payloadOwnership(e *env) {
	a, b := e.backend(), e.backend()
	hs := e.attach(e.name("own"), a, a, b)
	buf := make([]byte, 64)
	fill := func(s string) {
		for i := range buf {
			buf[i] = s[i%len(s)]
		}
	}
	const n = 20
	want := make([]string, n)
	for i := range n {
		fill(fmt.Sprint("m", i))
		want[i] = string(buf)
		if i%2 == 0 {
			e.publish(hs[0], buf)
		} else if err := hs[0].PublishAsync(e.ctx, buf); err != nil {
			e.fatalf("PublishAsync: %v", err)
		}
		fill("overwritten")
	}
	if err := hs[0].Flush(e.ctx); err != nil {
		e.fatalf("Flush: %v", err)
	}
	for i := range n {
		for _, h := range hs {
			ctx, done := e.patient()
			v, err := h.Listen(ctx)
			done()
			got, ok := v.([]byte)
			if err != nil || !ok || string(got) != want[i] {
				e.fatalf("message %d: got %s, %v; want %q", i, brief(v), err, want[i])
			}
			clear(got)
			_ = append(got, "and beyond"...)
		}
	}
	late := e.open(a, hs[0].Name(), dchannel.WithStart(dchannel.FromOldest()))
	e.expectGreeted(late, []byte(want[0]))
}

func slowListener(e *env) {
	a, b := e.backend(), e.backend()
	name := e.name("slow")
	small := dchannel.WithBuffer(64 << 10)
	slow, quick, far := e.open(a, name, small), e.open(a, name, small), e.open(b, name, small)
	e.greet(slow, quick, far)
	const n = 600
	payload := func(i int) string { return fmt.Sprintf("%04d %s", i, strings.Repeat("x", 1000)) }
	var read atomic.Int64
	e.all(
		func() {
			for i := range n {
				e.publish(quick, payload(i))
			}
		},
		func() {
			for i := range n {
				e.expect(quick, payload(i))
				read.Add(1)
			}
		},
		func() {
			for i := range n {
				e.expect(far, payload(i))
			}
		},
	)
	if s := slow.Status(); s.Lag != n {
		e.fatalf("the slow handle's lag is %d, want %d", s.Lag, n)
	} else if !s.CatchingUp {
		e.fatalf("%d kB wait in this process for a handle that does not read, with a buffer of 64 kB", n)
	}
	for i := range n {
		e.expect(slow, payload(i))
	}
	e.nothingElse(quick, slow, quick, far)
}

func cancelListen(e *env) {
	b := e.backend()
	h := e.attach(e.name("cancel"), b)[0]
	itself := func(err, ctxErr error) string {
		if err != ctxErr { //nolint:errorlint // this very value is promised
			return fmt.Sprintf("returned %v, want %v itself, unwrapped", err, ctxErr)
		}
		return ""
	}
	e.prompt("Listen", func(ctx context.Context) error {
		_, err := h.Listen(ctx)
		return err
	}, itself)
	e.prompt("Next", func(ctx context.Context) error {
		_, err := h.Next(ctx)
		return err
	}, itself)
	// While another goroutine holds the handle's turn.
	ctx, done := context.WithCancel(e.ctx)
	other := make(chan struct{})
	e.start(func() {
		defer close(other)
		_, _ = h.Listen(ctx)
	})
	e.prompt("a second Listen", func(ctx context.Context) error {
		_, err := h.Listen(ctx)
		return err
	}, itself)
	done()
	<-other
	e.nothingElse(h, h)

	over, end := context.WithCancel(e.ctx)
	end()
	e.publish(h, "waiting")
	if _, err := h.Listen(over); err != context.Canceled { //nolint:errorlint // this very value is promised
		e.fatalf("Listen with a context that is over: %v, want context.Canceled itself", err)
	}
	e.expect(h, "waiting")
}

func cancelWhileDown(e *env) {
	hole := e.h.Blackhole
	if hole == nil {
		hole = e.h.Cut
	}
	e.need(hole != nil, "Blackhole or Cut")
	b := e.backend()
	name := e.name("stuck")
	h := e.attach(name, b)[0]
	heal := e.once(hole(e.tb, b))
	some := func(err, ctxErr error) string {
		if !errIs(err, ctxErr, dchannel.ErrUncertain) {
			return fmt.Sprintf("returned %v, want one that is %v", err, ctxErr)
		}
		return ""
	}
	e.prompt("Publish", func(ctx context.Context) error { return h.Publish(ctx, "x") }, some)
	e.prompt("Listen", func(ctx context.Context) error {
		_, err := h.Listen(ctx)
		return err
	}, some)
	e.prompt("Open", func(ctx context.Context) error {
		_, err := dchannel.Open(ctx, e.name("fresh"), b)
		return err
	}, some)
	e.prompt("the first Listen", func(ctx context.Context) error {
		_, err := e.handle(b, e.name("lazy")).Listen(ctx)
		return err
	}, some)
	e.prompt("CloseContext", func(ctx context.Context) error {
		return e.handle(b, e.name("other")).CloseContext(ctx)
	}, some)
	e.prompt("Remove", func(ctx context.Context) error { return dchannel.Remove(ctx, e.name("gone"), b) }, some)
	e.prompt("Flush", func(ctx context.Context) error {
		if err := h.PublishAsync(ctx, "x"); err != nil {
			return err
		}
		return h.Flush(ctx)
	}, some)
	heal()
	if err := h.Flush(e.ctx); err != nil {
		e.logf("Flush after the fault: %v", err)
	}
}
