import torch

from diffusers_byoc import DualChannelUNet3D
from diffusers_byoc.training.starting_weights import take_unet_weights


def make_unet(num_classes):
    return DualChannelUNet3D(2, 2, 4, (8, 8), 1, attention_head_dim=4, num_class_embeds=num_classes).eval()


def predict(unet, label=None):
    sample = torch.randn(1, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return unet(sample, 300, None if label is None else torch.tensor([label])).sample


def test_a_network_for_one_class_begins_as_that_class():
    trained, unet = make_unet(3), make_unet(None)
    take_unet_weights(unet, trained, {"a": 0, "b": 1, "c": 2}, ["b"])
    torch.testing.assert_close(predict(unet), predict(trained, 1))
    assert (predict(unet) - predict(trained, 0)).abs().max() > 1e-3


def test_known_classes_keep_their_embedding_and_new_ones_begin_between_them():
    trained, unet = make_unet(2), make_unet(3)
    take_unet_weights(unet, trained, {"a": 0, "c": 1}, ["a", "b", "c"])
    torch.testing.assert_close(predict(unet, 0), predict(trained, 0))
    torch.testing.assert_close(predict(unet, 2), predict(trained, 1))
    torch.testing.assert_close(unet.class_embedding.weight[1], trained.class_embedding.weight.mean(0))


def test_a_network_without_classes_is_where_classes_begin():
    trained, unet = make_unet(None), make_unet(2)
    take_unet_weights(unet, trained, None, ["a", "b"])
    torch.testing.assert_close(predict(unet, 0), predict(trained))
    torch.testing.assert_close(predict(unet, 1), predict(trained))


def test_numbers_that_only_one_of_both_takes_begin_as_nothing():
    with_doses = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 1}
    arguments = (2, 2, 4, (8, 8), 1)
    plain, trained = make_unet(None), DualChannelUNet3D(*arguments, attention_head_dim=4, **with_doses).eval()
    torch.nn.init.normal_(trained.condition_embedding.linear_2.weight)
    for start, unet in (
        (plain, DualChannelUNet3D(*arguments, attention_head_dim=4, **with_doses).eval()),
        (trained, make_unet(None)),
        (trained, DualChannelUNet3D(*arguments, attention_head_dim=4, **with_doses).eval()),
    ):
        take_unet_weights(unet, start, None, ["cell"])
        sample, dose = torch.randn(1, 4, 4, 4, 4), torch.tensor([[1.0]])
        started, now = (
            network(sample, 300, conditions=dose if network.config.class_embed_type else None).sample
            for network in (start, unet)
        )
        if start is trained and unet.condition_embedding is None:
            nothing = start(sample, 300, conditions=torch.full_like(dose, torch.nan)).sample
            torch.testing.assert_close(now, nothing)
        else:
            torch.testing.assert_close(now, started)


def test_a_timestep_for_each_channel_begins_as_one_for_all():
    arguments = {"attention_head_dim": 4, "channel_timesteps_prob": 0.5}
    joint, apart = make_unet(None), DualChannelUNet3D(2, 2, 4, (8, 8), 1, **arguments).eval()
    take_unet_weights(apart, joint, None, ["cell"])
    torch.testing.assert_close(predict(apart), predict(joint))
    torch.nn.init.normal_(apart.time_embedding.linear_1.weight)
    again, back = DualChannelUNet3D(2, 2, 4, (8, 8), 1, **arguments).eval(), make_unet(None)
    for unet in (again, back):
        take_unet_weights(unet, apart, None, ["cell"])
        torch.testing.assert_close(predict(unet), predict(apart))
    sample, times = torch.randn(1, 4, 4, 4, 4), torch.tensor([[300, -1]])
    torch.testing.assert_close(again(sample, times).sample, apart(sample, times).sample)
