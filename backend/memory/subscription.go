package memory

import (
	"errors"
	"slices"

	"github.com/dchannel/dchannel"
)

// subscription is one backend's push of one channel.
type subscription struct {
	backend *Backend
	slot    *slot
	sink    dchannel.Sink

	// Under slot.mu:
	down bool  // pushes are lost
	due  error // why to resync when the store goes on
}

// subscribe adds a subscription to channel's slot.
func (b *Backend) subscribe(channel string, sink dchannel.Sink, force bool) (dchannel.Subscription, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if f := b.down.Load(); f != nil { // again, for Cut looks at b.subs under the lock
		return nil, f.err
	}
	sl, err := b.store.enter(channel, force)
	if err != nil {
		return nil, err
	}
	sub := &subscription{backend: b, slot: sl, sink: sink}
	sl.subs = append(sl.subs, sub)
	b.subs[sub] = struct{}{}
	sl.mu.Unlock()
	return sub, nil
}

// Close implements [dchannel.Subscription].
func (sub *subscription) Close() {
	b := sub.backend
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, open := b.subs[sub]; !open {
		return
	}
	delete(b.subs, sub)
	sub.end(nil)
}

// end takes sub out of its slot, after a last word. Backend.mu is held.
func (sub *subscription) end(last func()) {
	sl := sub.slot
	sl.mu.Lock()
	if last != nil {
		last()
	}
	i := slices.Index(sl.subs, sub)
	sl.subs = slices.Delete(sl.subs, i, i+1)
	if len(sl.subs) == 0 {
		sl.subs = nil
		sl.store.sweepBy(sl.deadline())
	}
	sl.store.leave(sl)
}

var errDropped = errors.New("memory: pushes were dropped")

// push hands e to the sink. The slot is locked, here and below.
func (sub *subscription) push(e dchannel.Entry) {
	switch {
	case sub.down:
	case take(&sub.backend.dropPushes):
		sub.sink.Resync(errDropped)
	default:
		sub.sink.Entry(e)
	}
}

// interrupt stops the pushes.
func (sub *subscription) interrupt(reason error) {
	if !sub.down {
		sub.down = true
		sub.sink.State(dchannel.StateInterrupted, reason)
	}
}

// restore lets pushes flow again, now or, if the store is paused, when it goes on.
func (sub *subscription) restore(reason error) {
	if !sub.down {
		return
	}
	if sub.slot.store.gate.Load() {
		sub.due = reason
		return
	}
	sub.down, sub.due = false, nil
	sub.sink.State(dchannel.StateLive, nil)
	sub.sink.Resync(reason)
}
