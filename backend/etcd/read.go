package etcd

import (
	"context"
	"fmt"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/entry"
)

// Read gets ranges of entry keys at the present revision, so that it does not matter whether older
// ones were compacted. etcd limits a range by keys, not by bytes: the first range is small, and
// the next ones follow the size seen.
func (b *Backend) Read(ctx context.Context, channel string, after dchannel.Position, limit int) (dchannel.Page, error) {
	ctx, done, err := b.begin(ctx)
	if err != nil {
		return dchannel.Page{}, err
	}
	defer done()
	name := escape(channel)
	for {
		page, ok, err := b.read(ctx, name, after, limit)
		if err != nil || ok {
			return page, err
		}
	}
}

// read is Read, unless a new log began between two of its ranges.
func (b *Backend) read(ctx context.Context, name string, after dchannel.Position, limit int) (page dchannel.Page, ok bool, _ error) {
	const firstKeys, mostKeys = 8, 1024
	keys, size, epoch := firstKeys, 0, uint64(0)
	for {
		p, err := b.page(ctx, name, after, keys)
		if err != nil {
			return dchannel.Page{}, false, err
		}
		if epoch != 0 && p.head.Epoch != epoch {
			return dchannel.Page{}, false, nil
		}
		epoch = p.head.Epoch
		page.Head = dchannel.Head{Position: p.head.Position, ID: p.head.id, Closed: p.head.closed, Incarnation: p.incarnation}
		for _, e := range p.entries {
			page.Entries = append(page.Entries, e)
			if size += len(e.Data); size > limit {
				return page, true, nil
			}
			after = e.Position
		}
		if !p.more || len(p.entries) == 0 {
			return page, true, nil
		}
		mean := size/len(page.Entries) + 1
		keys = min(max((limit-size)/mean+1, firstKeys), mostKeys)
	}
}

type page struct {
	entries     []dchannel.Entry
	head        tail
	incarnation dchannel.ID
	more        bool
}

// page gets up to keys entries behind after, with the head and the namespace's ID of the same
// moment. In another log than after's it begins at the oldest entry.
func (b *Backend) page(ctx context.Context, name string, after dchannel.Position, keys int) (page, error) {
	for {
		p, epoch, err := b.pageOf(ctx, name, after, keys)
		if err != nil || epoch == after.Epoch {
			return p, err
		}
		after = dchannel.Position{Epoch: epoch}
	}
}

// pageOf is page for the log of after.Epoch. It returns the epoch there is; if that is another, there
// are no entries in the answer.
func (b *Backend) pageOf(ctx context.Context, name string, after dchannel.Position, keys int) (p page, epoch uint64, _ error) {
	ops := []clientv3.Op{clientv3.OpGet(b.keys.id), clientv3.OpGet(b.keys.head(name))}
	if after.Epoch != 0 {
		behind := b.keys.entry(name, after) + "\x00"
		ops = append(ops, clientv3.OpGet(behind,
			clientv3.WithRange(b.keys.epochEnd(name, after.Epoch)), clientv3.WithLimit(int64(keys))))
	}
	resp, incarnation, err := b.ask(ctx, ops)
	if err != nil {
		return page{}, 0, err
	}
	p.incarnation = incarnation
	if p.head, err = headOf(resp[1].GetResponseRange()); err != nil {
		return page{}, 0, err
	}
	if p.head.Epoch == 0 {
		return p, after.Epoch, nil // no log: what is left of one is not there
	}
	if p.head.Epoch != after.Epoch {
		return p, p.head.Epoch, nil
	}
	r := resp[2].GetResponseRange()
	p.more = r.More
	for _, kv := range r.Kvs {
		e, err := entry.Parse(kv.Value)
		if err != nil {
			return page{}, 0, fmt.Errorf("%w: %w", dchannel.ErrRefused, err)
		}
		p.entries = append(p.entries, e)
	}
	return p, p.head.Epoch, nil
}

// ask runs the reads, of which the first is of the namespace's ID, as one linearizable transaction. If
// there is no ID it makes one and asks again: heads are only worth something under an incarnation.
func (b *Backend) ask(ctx context.Context, ops []clientv3.Op) ([]*pb.ResponseOp, dchannel.ID, error) {
	for {
		k := b.memory.mark()
		resp, err := b.kv.Txn(ctx).Then(ops...).Commit()
		if err != nil {
			return nil, dchannel.ID{}, mapError(ctx, err, false)
		}
		b.observe(k, resp.Header)
		if id := namespaceID(resp.Responses[0].GetResponseRange()); id != (dchannel.ID{}) {
			return resp.Responses, b.incarnation(id, resp.Header), nil
		}
		if err := b.identify(ctx); err != nil {
			return nil, dchannel.ID{}, mapError(ctx, err, false)
		}
	}
}

// headsPerTxn stays below the server's default --max-txn-ops of 128.
const headsPerTxn = 120

// Heads reads 120 heads in one transaction, and four transactions at a time.
func (b *Backend) Heads(ctx context.Context, channels []string) ([]dchannel.Head, error) {
	ctx, done, err := b.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	if len(channels) <= headsPerTxn {
		heads := make([]dchannel.Head, len(channels))
		return heads, b.heads(ctx, channels, heads)
	}
	var wg sync.WaitGroup
	heads := make([]dchannel.Head, len(channels))
	errs := make(chan error, len(channels)/headsPerTxn+1)
	slots := make(chan struct{}, 4)
	for i := 0; i < len(channels); i += headsPerTxn {
		slots <- struct{}{}
		end := min(i+headsPerTxn, len(channels))
		wg.Go(func() {
			defer func() { <-slots }()
			if err := b.heads(ctx, channels[i:end], heads[i:end]); err != nil {
				errs <- err
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		return nil, err
	default:
		return heads, nil
	}
}

func (b *Backend) heads(ctx context.Context, channels []string, into []dchannel.Head) error {
	ops := make([]clientv3.Op, 1, len(channels)+1)
	ops[0] = clientv3.OpGet(b.keys.id)
	for _, c := range channels {
		ops = append(ops, clientv3.OpGet(b.keys.head(escape(c))))
	}
	resp, incarnation, err := b.ask(ctx, ops)
	if err != nil {
		return err
	}
	for i := range channels {
		t, err := headOf(resp[i+1].GetResponseRange())
		if err != nil {
			return err
		}
		into[i] = dchannel.Head{Position: t.Position, ID: t.id, Closed: t.closed, Incarnation: incarnation}
	}
	return nil
}

// Remove deletes head, entries and lock in one transaction.
func (b *Backend) Remove(ctx context.Context, channel string) error {
	ctx, done, err := b.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	if err := b.ready(ctx); err != nil {
		return err
	}
	name := escape(channel)
	k := b.memory.mark()
	resp, err := b.kv.Txn(ctx).Then(clientv3.OpDelete(b.keys.head(name)),
		clientv3.OpDelete(b.keys.log(name), clientv3.WithPrefix()),
		clientv3.OpDelete(b.keys.lock(name), clientv3.WithPrefix())).Commit()
	if err != nil {
		return mapError(ctx, err, true)
	}
	b.observe(k, resp.Header)
	b.tails.forget(name)
	return nil
}

// headOf reads the head from the answer to a Get of its key; zero if there is none.
func headOf(r *pb.RangeResponse) (tail, error) {
	if len(r.Kvs) == 0 {
		return tail{}, nil
	}
	t, err := parseTail(r.Kvs[0].Value)
	if err != nil {
		return tail{}, fmt.Errorf("%w: %w", dchannel.ErrRefused, err)
	}
	return t, nil
}
