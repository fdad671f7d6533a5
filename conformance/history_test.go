package conformance

import (
	"fmt"
	"slices"
	"testing"

	"github.com/dchannel/dchannel"
)

// writer makes up a history.
type writer struct{ history }

func (w *writer) publish(publisher string, n int, err error) {
	w.end(w.begin(publisher, n), err)
}

func (w *writer) deliver(listener, payload string, epoch, seq uint64) {
	w.got(listener, event{payload: payload, pos: dchannel.Position{Epoch: epoch, Seq: seq}})
}

func (w *writer) lose(listener string, count, epoch, after, next uint64) {
	w.got(listener, event{lost: &dchannel.LostError{
		Count: count, After: dchannel.Position{Epoch: epoch, Seq: after}, Next: dchannel.Position{Epoch: epoch, Seq: next},
	}})
}

func (w *writer) closing(err error) { _ = w.close(func() error { return err }) }

func (w *writer) over(listener string) { w.got(listener, event{closed: true}) }

// TestValidate plants violations: each must be found, under its name and no other.
func TestValidate(t *testing.T) {
	t.Parallel()
	down := fmt.Errorf("publish: %w", dchannel.ErrUnavailable)
	unknown := fmt.Errorf("publish: %w", dchannel.ErrUncertain)
	refusedByClose := fmt.Errorf("publish: %w", dchannel.ErrChanClosed)
	// good is what most of them begin with: two publishers, two listeners.
	good := func(w *writer) {
		w.publish("a", 0, nil)
		w.publish("b", 0, nil)
		w.publish("a", 1, nil)
		for _, l := range []string{"l", "m"} {
			w.deliver(l, "a#0", 1, 5)
			w.deliver(l, "b#0", 1, 6)
			w.deliver(l, "a#1", 1, 7)
		}
	}
	for _, c := range []struct {
		what   string
		checks checks
		write  func(w *writer)
		want   string // empty: nothing
	}{
		{"all is well", checks{}, good, ""},
		{"a close at the end", checks{}, func(w *writer) {
			good(w)
			w.closing(nil)
			w.publish("a", 2, refusedByClose)
			w.over("l")
			w.over("m")
			w.over("m")
		}, ""},
		{"refused and uncertain ones that nobody got", checks{}, func(w *writer) {
			good(w)
			w.publish("a", 2, down)
			w.publish("a", 3, unknown)
		}, ""},
		{"an uncertain one that all got", checks{}, func(w *writer) {
			good(w)
			w.publish("a", 2, unknown)
			w.deliver("l", "a#2", 1, 8)
			w.deliver("m", "a#2", 1, 8)
		}, ""},
		{"a gap that is reported", checks{lossOK: true}, func(w *writer) {
			good(w)
			for n := 2; n < 6; n++ {
				w.publish("a", n, nil)
			}
			w.lose("l", 3, 1, 7, 11)
			w.deliver("l", "a#5", 1, 11)
			w.lose("m", 3, 1, 7, 11)
			w.deliver("m", "a#5", 1, 11)
		}, ""},
		{"a loss of state that is reported", checks{stateLost: true}, func(w *writer) {
			good(w)
			w.publish("a", 2, nil)
			w.lose("l", 0, 1, 7, 0)
			w.lose("m", 0, 1, 7, 0)
			w.publish("a", 3, nil)
			w.deliver("l", "a#3", 2, 1)
			w.deliver("m", "a#3", 2, 1)
		}, ""},

		{"a message that nobody published", checks{}, func(w *writer) {
			good(w)
			w.deliver("l", "who?", 1, 8)
		}, "RoundTrip"},
		{"two listeners see different messages at one place", checks{}, func(w *writer) {
			w.publish("a", 0, nil)
			w.publish("b", 0, nil)
			w.deliver("l", "a#0", 1, 5)
			w.deliver("l", "b#0", 1, 6)
			w.deliver("m", "b#0", 1, 5)
			w.deliver("m", "a#0", 1, 6)
		}, "Order"},
		{"a publisher's messages change places", checks{}, func(w *writer) {
			w.publish("a", 0, nil)
			w.publish("a", 1, nil)
			w.deliver("l", "a#1", 1, 5)
			w.deliver("l", "a#0", 1, 6)
		}, "Order"},
		{"positions go back", checks{}, func(w *writer) {
			w.publish("a", 0, nil)
			w.publish("b", 0, nil)
			w.deliver("l", "a#0", 1, 6)
			w.deliver("l", "b#0", 1, 5)
		}, "Order"},
		{"one message twice for a listener", checks{}, func(w *writer) {
			w.publish("a", 0, nil)
			w.deliver("l", "a#0", 1, 5)
			w.deliver("l", "a#0", 1, 6)
		}, "ExactlyOnce"},
		{"one message at two places", checks{}, func(w *writer) {
			w.publish("a", 0, nil)
			w.deliver("l", "a#0", 1, 5)
			w.deliver("m", "a#0", 1, 6)
		}, "ExactlyOnce"},
		{"a hole", checks{}, func(w *writer) {
			w.publish("a", 0, nil)
			w.publish("a", 1, unknown)
			w.publish("a", 2, nil)
			w.deliver("l", "a#0", 1, 5)
			w.deliver("l", "a#2", 1, 7)
		}, "NoSilentLoss"},
		{"one of two does not get the last one", checks{}, func(w *writer) {
			good(w)
			w.publish("a", 2, nil)
			w.deliver("l", "a#2", 1, 8)
		}, "NoSilentLoss"},
		{"another epoch and no word", checks{}, func(w *writer) {
			good(w)
			w.publish("a", 2, nil)
			w.deliver("l", "a#2", 2, 1)
			w.deliver("m", "a#2", 2, 1)
		}, "NoSilentLoss"},
		{"a loss where everything is retained", checks{}, func(w *writer) {
			good(w)
			w.lose("l", 1, 1, 7, 9)
		}, "NoSilentLoss"},
		{"a loss of unknown size without a loss of state", checks{lossOK: true}, func(w *writer) {
			good(w)
			w.lose("l", 0, 1, 7, 9)
		}, "NoSilentLoss"},
		{"a loss with a wrong count", checks{lossOK: true}, func(w *writer) {
			good(w)
			w.lose("l", 2, 1, 7, 9)
		}, "NoSilentLoss"},
		{"a loss at another place", checks{lossOK: true}, func(w *writer) {
			good(w)
			w.lose("l", 2, 1, 8, 11)
		}, "NoSilentLoss"},
		{"a loss that is not all", checks{lossOK: true}, func(w *writer) {
			good(w)
			for n := 2; n < 6; n++ {
				w.publish("a", n, unknown)
			}
			w.lose("l", 2, 1, 7, 10)
			w.deliver("l", "a#5", 1, 11)
		}, "NoSilentLoss"},
		{"accepted, and gone for all", checks{}, func(w *writer) {
			good(w)
			w.publish("a", 2, nil)
		}, "Accepted"},
		{"accepted after the loss of state, and gone", checks{stateLost: true}, func(w *writer) {
			good(w)
			w.lose("l", 0, 1, 7, 0)
			w.lose("m", 0, 1, 7, 0)
			w.publish("a", 3, nil)
		}, "Accepted"},
		{"surely not sent, and delivered", checks{}, func(w *writer) {
			good(w)
			w.publish("a", 2, down)
			w.deliver("l", "a#2", 1, 8)
		}, "Accepted"},
		{"accepted before the close, and not delivered", checks{}, func(w *writer) {
			good(w)
			w.publish("a", 2, nil)
			w.closing(nil)
			w.over("l")
			w.over("m")
		}, "CloseDrains"},
		{"accepted during the close, and gone", checks{}, func(w *writer) {
			good(w)
			p := w.begin("a", 2)
			w.closing(nil)
			w.end(p, nil)
			w.over("l")
			w.over("m")
		}, "CloseRacesPublish"},
		{"accepted after the close", checks{}, func(w *writer) {
			good(w)
			w.closing(nil)
			w.publish("a", 2, nil)
			w.deliver("l", "a#2", 1, 8)
			w.deliver("m", "a#2", 1, 8)
		}, "CloseRacesPublish"},
		{"a message after the close", checks{}, func(w *writer) {
			good(w)
			w.publish("a", 2, unknown)
			w.over("l")
			w.deliver("l", "a#2", 1, 8)
		}, "CloseFinal"},
	} {
		w := &writer{}
		c.write(w)
		var found []string
		vs := w.validate(c.checks)
		for _, v := range vs {
			found = append(found, v.guarantee)
		}
		slices.Sort(found)
		found = slices.Compact(found)
		var want []string
		if c.want != "" {
			want = []string{c.want}
		}
		if !slices.Equal(found, want) {
			t.Errorf("%s: found %v, want %q", c.what, vs, c.want)
		}
	}
}
