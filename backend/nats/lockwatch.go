package nats

import (
	"context"

	"github.com/dchannel/dchannel"
)

// WatchLock implements [dchannel.Locker]: one core subscription to what the stream publishes again. Expiry
// is not told by the server.
func (b *Backend) WatchLock(ctx context.Context, channel string, hint func()) (dchannel.Subscription, error) {
	return b.subscribe(ctx, func() *subscription {
		return &subscription{
			b: b, subject: b.names.lockPush(channel), sink: hinter(hint), lock: true,
			channel: unremembered(channel),
		}
	})
}

// unremembered is a channel of which nothing is remembered.
func unremembered(name string) *channel { return &channel{name: name} }

// hinter is the sink of who waits for a lock.
type hinter func()

func (h hinter) Entry(dchannel.Entry) { h() }
func (h hinter) Resync(error)         { h() }

// State: an interruption is no news of the lock, and its end comes as a Resync. When all is over, so
// is the wait.
func (h hinter) State(s dchannel.State, _ error) {
	if s == dchannel.StateFailed {
		h()
	}
}

// lockPushed hints that the lock's last message is the one at place (0 for none), unless that is known.
func (b *Backend) lockPushed(s *subscription, place uint64) {
	b.memory.see(place)
	s.mu.Lock()
	news := place != s.place // another stream begins anew
	s.place = place
	s.mu.Unlock()
	if news {
		s.entry(dchannel.Entry{})
	}
}

// compareLocks looks whether a push of a watched lock was lost on its way, as CheckEvery says of logs: one
// request for a thousand of them, which carries their records. At most one runs at a time.
func (b *Backend) compareLocks() {
	of := make(map[string]*subscription)
	var subjects []string
	for _, s := range b.subscriptions() {
		if s.lock {
			subject := b.names.lock(s.channel.name)
			of[subject] = s
			subjects = append(subjects, subject)
		}
	}
	if len(of) == 0 || !b.verified.Load() || !b.comparing.CompareAndSwap(false, true) {
		return
	}
	if !b.spawn(func() {
		defer b.comparing.Store(false)
		ctx, cancel := context.WithTimeout(context.Background(), answerTimeout)
		defer cancel()
		for ; len(subjects) > 0; subjects = subjects[min(len(subjects), headsAtOnce):] {
			o, err := b.look(ctx, basis{}, 0, subjects[:min(len(subjects), headsAtOnce)])
			if err != nil {
				return // the next time
			}
			last := make(map[string]uint64)
			for _, m := range o.answers {
				last[header(m, headerSubject)] = number(m, headerSequence)
			}
			for _, subject := range subjects[:min(len(subjects), headsAtOnce)] {
				if place := last[subject]; place > 0 || !o.cut {
					b.lockPushed(of[subject], place)
				}
			}
		}
	}) {
		b.comparing.Store(false)
	}
}
