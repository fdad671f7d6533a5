package conformance

import (
	"context"
	"math"
	"strings"
	"time"

	"github.com/dchannel/dchannel"
)

var badInput = []guarantee{{
	name: "BadInput",
	rule: "what cannot be used is said so, by the documented error, at the first use; nothing is sent and nothing panics",
	cases: []testCase{
		{"Names", badNames},
		{"Backend", badBackends},
		{"Options", badOptions},
		{"Values", badValues},
		{"ClosedBackend", closedBackend},
	},
}}

// refused checks that every use of h is the error want.
func (e *env) refused(what string, h Handle, want error) {
	_, listen := h.Listen(e.ctx)
	e.expectErr(what+": Listen", listen, want)
	e.expectErr(what+": Publish", h.Publish(e.ctx, "x"), want)
	async := h.PublishAsync(e.ctx, "x")
	if async == nil {
		async = h.Flush(e.ctx)
	}
	e.expectErr(what+": PublishAsync or Flush", async, want)
	e.expectErr(what+": Close", h.Close(), want)
	if h.IsClosed() {
		e.fatalf("%s: IsClosed is true", what)
	}
	if err := h.Detach(); err != nil {
		e.fatalf("%s: Detach: %v", what, err)
	}
}

func badNames(e *env) {
	b := e.backend()
	for _, name := range []string{
		"", strings.Repeat("n", dchannel.MaxNameLen+1), strings.Repeat("日", 86), "a\xffb", "\xc3", "a\nb", "\x00", "a\tb", "\x7f", "\u0085",
	} {
		_, err := dchannel.Open(e.ctx, name, b)
		e.expectErr("Open", err, dchannel.ErrInvalidName)
		e.expectErr("Remove", dchannel.Remove(e.ctx, name, b), dchannel.ErrInvalidName)
		e.refused("a bad name", e.handle(b, name), dchannel.ErrInvalidName)
	}
}

func badBackends(e *env) {
	b := e.backend()
	_, err := dchannel.Open(e.ctx, "x", nil)
	e.expectErr("Open without a backend", err, dchannel.ErrInvalidOption)
	e.expectErr("Remove without a backend", dchannel.Remove(e.ctx, "x", nil), dchannel.ErrInvalidOption)
	e.refused("no backend", e.wrapped(dchannel.New("x", nil), b), dchannel.ErrInvalidOption)
}

func badOptions(e *env) {
	b := e.backend()
	for what, opt := range map[string]dchannel.Option{
		"nil":                    nil,
		"WithCodec(nil)":         dchannel.WithCodec(nil),
		"WithMaxMessage(-1)":     dchannel.WithMaxMessage(-1),
		"WithMaxMessage(0)":      dchannel.WithMaxMessage(0),
		"WithTimeout(-1)":        dchannel.WithTimeout(-1),
		"WithTimeout(0)":         dchannel.WithTimeout(0),
		"WithCloseKeep(-1s)":     dchannel.WithCloseKeep(-time.Second),
		"WithCloseKeep(1ms)":     dchannel.WithCloseKeep(time.Millisecond),
		"WithBuffer(-1)":         dchannel.WithBuffer(-1),
		"WithQueue(0)":           dchannel.WithQueue(0),
		"WithStart(After(0, 5))": dchannel.WithStart(dchannel.After(dchannel.Position{Seq: 5})),
	} {
		_, err := dchannel.Open(e.ctx, e.name("o"), b, opt)
		e.expectErr("Open with "+what, err, dchannel.ErrInvalidOption)
		e.refused(what, e.handle(b, e.name("o"), opt), dchannel.ErrInvalidOption)
	}
}

// noCodec refuses everything.
type noCodec struct{ dchannel.Codec }

func (noCodec) Name() string                { return "none" }
func (noCodec) Marshal(any) ([]byte, error) { panic("not today") }

func badValues(e *env) {
	b := e.backend()
	h := e.attach(e.name("values"), b)[0]
	for _, v := range []any{make(chan int), func() {}, math.NaN(), map[string]any{"f": func() {}}} {
		e.expectErr("Publish of a value that JSON refuses", h.Publish(e.ctx, v), dchannel.ErrCodec)
		e.expectErr("PublishAsync of a value that JSON refuses", h.PublishAsync(e.ctx, v), dchannel.ErrCodec)
	}
	none := e.handle(b, h.Name(), dchannel.WithCodec(noCodec{}))
	e.expectErr("Publish with a codec that panics", none.Publish(e.ctx, 1), dchannel.ErrCodec)
	other := e.open(b, h.Name(), dchannel.WithCodec(noCodec{}))
	e.publish(h, 1)
	e.publish(h, "readable")
	_, err := other.Listen(e.ctx)
	e.expectErr("Listen to a message of another codec", err, dchannel.ErrCodec)
	e.expect(other, "readable")
	e.expect(h, 1.0, "readable")

	over, end := context.WithCancel(e.ctx)
	end()
	e.expectErr("Publish with a context that is over", h.Publish(over, "x"), context.Canceled)
	e.nothingElse(h, h, other)
}

func closedBackend(e *env) {
	b := e.backend()
	name := e.name("late")
	h := e.attach(name, b)[0]
	if err := b.Close(); err != nil {
		e.fatalf("Backend.Close: %v", err)
	}
	ctx, done := e.patient()
	defer done()
	_, err := h.Listen(ctx)
	e.expectErr("Listen of a handle of a closed backend", err, dchannel.ErrBackendClosed)
	e.expectErr("Publish of a handle of a closed backend", h.Publish(ctx, "x"), dchannel.ErrBackendClosed)
	_, err = dchannel.Open(ctx, name, b)
	e.expectErr("Open on a closed backend", err, dchannel.ErrBackendClosed)
	e.expectErr("Remove on a closed backend", dchannel.Remove(ctx, name, b), dchannel.ErrBackendClosed)
	e.refused("a closed backend", e.handle(b, e.name("new")), dchannel.ErrBackendClosed)

	_, err = b.Publish(ctx, name, dchannel.Frame{ID: dchannel.NewID(), Count: 1, Data: []byte{1}})
	e.expectErr("Backend.Publish", err, dchannel.ErrBackendClosed)
	_, err = b.MarkClosed(ctx, name, dchannel.NewID(), time.Hour)
	e.expectErr("Backend.MarkClosed", err, dchannel.ErrBackendClosed)
	_, err = b.Read(ctx, name, dchannel.Position{}, 1)
	e.expectErr("Backend.Read", err, dchannel.ErrBackendClosed)
	_, err = b.Heads(ctx, nil)
	e.expectErr("Backend.Heads", err, dchannel.ErrBackendClosed)
	_, err = b.Subscribe(ctx, name, nil)
	e.expectErr("Backend.Subscribe", err, dchannel.ErrBackendClosed)
	if err := b.Close(); err != nil {
		e.fatalf("a second Backend.Close: %v", err)
	}
}
