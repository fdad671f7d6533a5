package redis

import (
	"context"
	"fmt"

	"github.com/dchannel/dchannel"
)

// WatchLock joins the connection of all subscriptions, as [Backend.Subscribe] does,
// and fails as that does. The lock's script publishes what it has changed; an expiry
// makes no message before somebody looks (see the package's Locks).
func (b *Backend) WatchLock(ctx context.Context, channel string, hint func()) (dchannel.Subscription, error) {
	sub, err := b.subscribe(ctx, b.keys.notices(channel), lockSink(hint))
	if err != nil {
		return nil, fmt.Errorf("redis: watch lock: %w", err)
	}
	return sub, nil
}

// lockSink is the sink of a lock's watch. The session calls it as a function for each
// message, whatever stands in that.
type lockSink func()

// Entry is never called: what comes on the lock's channel is no entry.
func (lockSink) Entry(dchannel.Entry) {}

// Resync hints: messages may have been missed.
func (hint lockSink) Resync(error) { hint() }

// State hints when the watch has ended for good: who waits looks once more, and is
// told why by the error. Otherwise there is nothing new before the Resync.
func (hint lockSink) State(s dchannel.State, _ error) {
	if s == dchannel.StateFailed {
		hint()
	}
}
