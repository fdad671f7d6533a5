package main

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"time"

	"github.com/dchannel/dchannel"
)

// The roles that a process can have.
const (
	roleListen  = "listen"
	rolePublish = "publish"
	roleClose   = "close"
	roleLate    = "late"
)

// order is the message of the demo.
type order struct {
	From string
	N    int
}

// report is what a process saw, and says at its end.
type report struct {
	Name       string
	Count      int
	Lost       uint64 // reported by the library
	Wrong      int    // messages that did not follow their publisher's previous one
	Order      string // a hash over what came in which order
	Reconnects uint64
	Closed     bool
	Error      string `json:",omitempty"`
}

// cue is how a process and the director talk.
type cue struct {
	ready func()          // I am ready
	wait  <-chan struct{} // go on
}

// act plays a role on b.
func act(ctx context.Context, b dchannel.Backend, p plan, role, name string, c cue) report {
	r := report{Name: name}
	var err error
	switch role {
	case roleListen:
		err = listen(ctx, b, &r, c.ready)
	case roleLate:
		err = listen(ctx, b, &r, c.ready, dchannel.WithStart(dchannel.FromOldest()))
	case rolePublish:
		err = publish(ctx, b, p, &r, c)
	case roleClose:
		err = dchannel.New(channel, b).Close()
	default:
		err = fmt.Errorf("no such role: %q", role)
	}
	if err != nil {
		r.Error = err.Error()
	}
	return r
}

func listen(ctx context.Context, b dchannel.Backend, r *report, ready func(), opts ...dchannel.Option) error {
	ch, err := dchannel.Open(ctx, channel, b, opts...)
	if err != nil {
		return err
	}
	defer ch.Detach() //nolint:errcheck // nothing was published
	r.Closed = ch.IsClosed()
	ready()
	last := map[string]int{}
	sum := fnv.New32a()
	for m, err := range dchannel.Of[order](ch).Messages(ctx) {
		if errors.Is(err, dchannel.ErrLost) {
			r.Lost++
			continue
		}
		if err != nil {
			return err
		}
		r.Count++
		if m.N != last[m.From]+1 {
			r.Wrong++
		}
		last[m.From] = m.N
		_, _ = io.WriteString(sum, fmt.Sprintln(m.From, m.N))
	}
	r.Order = fmt.Sprintf("%08x", sum.Sum32())
	r.Reconnects = ch.Status().Reconnects
	r.Closed = ch.IsClosed()
	return nil
}

func publish(ctx context.Context, b dchannel.Backend, p plan, r *report, c cue) error {
	ch := dchannel.New(channel, b, dchannel.WithTimeout(30*time.Second))
	defer ch.Detach() //nolint:errcheck // every Publish was awaited
	c.ready()
	select {
	case <-c.wait:
	case <-ctx.Done():
		return ctx.Err()
	}
	tick := time.NewTicker(p.pace)
	defer tick.Stop()
	for i := range p.messages {
		<-tick.C
		if err := ch.Publish(ctx, order{From: r.Name, N: i + 1}); err != nil {
			return err
		}
		r.Count++
	}
	return nil
}
