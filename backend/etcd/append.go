package etcd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/connectivity"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/entry"
)

// Publish appends f in one transaction on the condition that the head is what it was believed to
// be. A lost race costs one more round trip, and the answer to the lost one holds the new head.
func (b *Backend) Publish(ctx context.Context, channel string, f dchannel.Frame) (dchannel.Position, error) {
	return b.append(ctx, channel, dchannel.Entry{ID: f.ID, Count: f.Count, Data: f.Data}, b.opts.retention, f.Age)
}

// MarkClosed appends the marker; it and the head then live for keep, and for up to a
// quarter and two seconds more.
func (b *Backend) MarkClosed(ctx context.Context, channel string, id dchannel.ID, keep time.Duration) (dchannel.Position, error) {
	e := dchannel.Entry{ID: id, Count: 1, Closed: true}
	return b.append(ctx, channel, e, max(keep, time.Second), 0)
}

// appendage is one append on its way.
type appendage struct {
	name  string
	entry dchannel.Entry // but for position, Prev and time, which each attempt sets
	life  time.Duration
}

func (b *Backend) append(ctx context.Context, channel string, e dchannel.Entry, life, age time.Duration) (dchannel.Position, error) {
	ctx, done, err := b.begin(ctx)
	if err != nil {
		return dchannel.Position{}, err
	}
	defer done()
	a := appendage{name: escape(channel), entry: e, life: life}
	c := b.tails.hold(a.name)
	defer b.tails.release(c)
	if err := b.await(ctx, c); err != nil {
		return dchannel.Position{}, b.sinceThen(ctx, a, age, err)
	}
	defer func() { <-c.turn }()
	if age > 0 {
		pos, found, err := b.settle(ctx, a, c, age)
		if found || err != nil {
			return pos, b.sinceThen(ctx, a, age, err)
		}
	}
	return b.attempt(ctx, a, c)
}

// await takes the channel's turn and a connection. One append of a channel at a time: with its own
// kind it would only race.
func (b *Backend) await(ctx context.Context, c *belief) error {
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return unsent(ctx, "waiting for an append of the same channel")
	}
	err := b.ready(ctx)
	if err != nil {
		<-c.turn
	}
	return err
}

// sinceThen is the error of a retry that failed before it was known what became of the first
// attempt: that this one was not sent says nothing about the other.
func (b *Backend) sinceThen(ctx context.Context, a appendage, age time.Duration, err error) error {
	from, known := b.tails.floor(a.entry.ID)
	if err == nil || age == 0 || known && !from.sent ||
		errors.Is(err, dchannel.ErrUncertain) || errors.Is(err, dchannel.ErrChanClosed) {
		return err
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", dchannel.ErrUncertain, ended(ctx))
	}
	return fmt.Errorf("%w: %v", dchannel.ErrUncertain, err) //nolint:errorlint // its sentinel is of this attempt alone
}

// attempt sends the transaction until it is decided.
func (b *Backend) attempt(ctx context.Context, a appendage, c *belief) (dchannel.Position, error) {
	for conflicts := 0; ; {
		head := b.tails.get(c)
		if head.closed { // true once; the marker may have expired since
			head = tail{}
		}
		ops, next, err := b.appendOps(ctx, a, head)
		if err != nil {
			b.tails.remember(a.entry.ID, floor{})
			return dchannel.Position{}, mapUnsent(ctx, err)
		}
		same := clientv3.Compare(clientv3.Value(b.keys.head(a.name)), "=", head.String())
		if head == (tail{}) {
			same = clientv3.Compare(clientv3.CreateRevision(b.keys.head(a.name)), "=", 0)
		}
		k := b.memory.mark()
		resp, err := b.kv.Txn(ctx).If(same).Then(ops...).Else(clientv3.OpGet(b.keys.head(a.name))).Commit()
		if errors.Is(err, rpctypes.ErrLeaseNotFound) {
			b.leases.drop() // the server lost them; all or nothing, so nothing was done
			if conflicts++; conflicts < 4 {
				continue
			}
		}
		if err != nil {
			err = mapError(ctx, err, true)
			b.tails.set(c, nil)
			b.tails.remember(a.entry.ID, floor{head.Position, errors.Is(err, dchannel.ErrUncertain)})
			return dchannel.Position{}, err
		}
		b.observe(k, resp.Header)
		if resp.Succeeded {
			b.tails.set(c, &next)
			b.tails.settled(a.entry.ID)
			b.keepID(ctx)
			return next.Position, nil
		}
		head, err = headOf(resp.Responses[0].GetResponseRange())
		if err != nil {
			return dchannel.Position{}, err
		}
		b.tails.set(c, &head)
		if head.id == a.entry.ID && head != (tail{}) { // gRPC sent it twice
			b.tails.settled(a.entry.ID)
			return head.Position, nil
		}
		if head.closed {
			b.tails.settled(a.entry.ID)
			if a.entry.Closed {
				return head.Position, nil
			}
			return dchannel.Position{}, dchannel.ErrChanClosed
		}
		if conflicts++; conflicts > 1 {
			if err := pause(ctx, rand.N(time.Millisecond<<min(conflicts, 5))); err != nil {
				b.tails.remember(a.entry.ID, floor{})
				return dchannel.Position{}, unsent(ctx, "others keep appending first")
			}
		}
	}
}

// appendOps makes the writes of an append behind head, and the head that follows.
func (b *Backend) appendOps(ctx context.Context, a appendage, head tail) ([]clientv3.Op, tail, error) {
	lease, err := b.leases.get(ctx, a.life)
	if err != nil {
		return nil, tail{}, err
	}
	bookkeeping := lease
	if !a.entry.Closed {
		if bookkeeping, err = b.leases.get(ctx, b.opts.idle); err != nil {
			return nil, tail{}, err
		}
	}
	e := a.entry
	e.Epoch, e.Seq, e.Prev, e.Time = head.Epoch, head.Seq+uint64(e.Count), head.id, now()
	var ops []clientv3.Op
	if head == (tail{}) {
		// A new log. Microseconds, so that an epoch does not come again even when the store has
		// lost all memory of the old ones. What an old log left behind goes.
		e.Epoch = uint64(time.Now().UnixMicro())
		ops = append(ops,
			clientv3.OpDelete(b.keys.log(a.name), clientv3.WithRange(b.keys.entry(a.name, dchannel.Position{Epoch: e.Epoch}))),
			clientv3.OpDelete(b.keys.epochEnd(a.name, e.Epoch), clientv3.WithRange(clientv3.GetPrefixRangeEnd(b.keys.log(a.name)))))
	} else if end := b.trim(head.Seq, e.Seq); end > 0 {
		ops = append(ops, clientv3.OpDelete(b.keys.entry(a.name, dchannel.Position{Epoch: e.Epoch}),
			clientv3.WithRange(b.keys.entry(a.name, dchannel.Position{Epoch: e.Epoch, Seq: end}))))
	}
	next := tailOf(e)
	value := string(entry.Append(make([]byte, 0, len(e.Data)+192), e))
	ops = append(ops,
		clientv3.OpPut(b.keys.head(a.name), next.String(), clientv3.WithLease(bookkeeping)),
		clientv3.OpPut(b.keys.entry(a.name, next.Position), value, clientv3.WithLease(lease)))
	return ops, next, nil
}

// trim returns below which sequence number entries go, when the head moves from one number to
// another; 0 for not now. Every so often is enough, and by the numbers, so that one of all
// appending processes does it.
func (b *Backend) trim(from, to uint64) uint64 {
	keep := uint64(b.opts.messages)
	step := min(max(keep/64, 1), 256)
	if from/step == to/step || to <= keep {
		return 0
	}
	return to - keep + 1
}

// keepID renews the namespace's ID when it is due. A failure is left to the next call.
func (b *Backend) keepID(ctx context.Context) {
	if err := b.renew(ctx); err != nil && ctx.Err() == nil {
		b.log.Warn("etcd backend: cannot renew the namespace's id", "error", err)
	}
}

// ready waits until the client has a connection. The client would wait just so (its calls are
// WaitForReady), but then nobody could tell whether a write was sent.
func (b *Backend) ready(ctx context.Context) error {
	conn := b.client.ActiveConnection()
	for {
		s := conn.GetState()
		switch s {
		case connectivity.Ready, connectivity.Shutdown:
			return nil
		case connectivity.Idle:
			conn.Connect()
		}
		if !conn.WaitForStateChange(ctx, s) {
			return unsent(ctx, "no connection")
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// mapUnsent is mapError for what failed before the append was sent.
func mapUnsent(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return unsent(ctx, "granting a lease")
	}
	return mapError(ctx, err, false)
}
